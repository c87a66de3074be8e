"""A page in the browser; see `smalti.app.server`."""

from smalti import cli
from smalti.app.server import App, app

ABOUT = """A page in the browser, on this machine: paint over a part of an image and watch it filled; draw new images.

$ pip install 'smalti[app]'                        # Gradio; in a checkout: pip install -e '.[app]'
$ python scripts/app.py --prior runs/demo/prior    # then open http://127.0.0.1:7860
$ python scripts/app.py --prior runs/demo/prior --port 8000

It makes what inpaint.py and sample.py make with the same settings; the files it offers say which these were."""


def main() -> None:
    """The command."""
    cli.run(app, App, about=ABOUT)


if __name__ == "__main__":
    main()
