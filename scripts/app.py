"""Serves the web page; see `smalti.app.server`."""

from smalti import cli
from smalti.app.server import App, app

ABOUT = """Opens a web page on this machine to inpaint images and to sample new ones.

$ pip install -e '.[app]'                          # in a checkout: installs Gradio
$ python scripts/app.py --prior runs/demo/prior    # then open http://127.0.0.1:7860
$ python scripts/app.py --prior runs/demo/prior --port 8000

The results equal those of inpaint.py and sample.py with the same settings, which are stored in each file."""


def main() -> None:
    """Runs the command line."""
    cli.run(app, App, about=ABOUT)


if __name__ == "__main__":
    main()
