"""The command `reproduce.py`: the study is its first argument, wherever else a study's name appears."""

import sys

import pytest

from smalti.scripts import reproduce
from smalti.training.run_folder import OtherSettingsError

FLAGS = {"selfvae": "--steps", "size64": "--samples", "portraits": "--seed"}


def run(monkeypatch, *arguments):
    """Runs the command without its studies; returns the settings of the study that would have started."""
    started = []
    for name, study in reproduce.STUDIES.items():
        monkeypatch.setitem(reproduce.STUDIES, name, study._replace(command=started.append))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    reproduce.main()
    return started


def test_first_argument_chooses_the_study(monkeypatch):
    for name, study in reproduce.STUDIES.items():
        images = ("--images", "img") if name in ("hr-vqvae", "size64") else ()
        (config,) = run(monkeypatch, name, *images, FLAGS.get(name, "--seeds"), "2")
        assert type(config) is study.config_class


def test_name_of_another_study_as_a_value_does_not_start_it(monkeypatch):
    (config,) = run(monkeypatch, "hr-vqvae", "--images", "selfvae", "--work", "priors", "--out", "hqa")
    assert type(config) is reproduce.ReproduceHRVQVAE
    assert (config.images, str(config.work), str(config.out)) == ("selfvae", "priors", "hqa")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "no study was named"),
        (("vqgan",), "'vqgan' is not a study"),
        (("--work", "hqa"), "'--work' is not a study"),
    ],
)
def test_command_line_without_a_study_is_refused_in_one_line(monkeypatch, capsys, arguments, problem):
    with pytest.raises(SystemExit) as exit_status:
        run(monkeypatch, *arguments)
    assert exit_status.value.code == 2
    studies = "hr-vqvae, hqa, selfvae, sundae, priors, quantizers, overfitting, size64 or portraits"
    advice = f"the first argument must be {studies}"
    assert capsys.readouterr().err == f"error: {problem}; {advice}\n"


@pytest.mark.parametrize(("name", "flag"), [("quantizers", "--work"), ("portraits", "--out")])
def test_trainings_of_other_settings_are_refused_with_the_flag_of_the_study(monkeypatch, capsys, name, flag):
    def refuse(_config):
        raise OtherSettingsError("runs/x holds a run with --images a, not --images b; give another --out")

    monkeypatch.setitem(reproduce.STUDIES, name, reproduce.STUDIES[name]._replace(command=refuse))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", name])
    with pytest.raises(SystemExit):
        reproduce.main()
    advice = f"give the same settings, or another {flag}"
    assert capsys.readouterr().err == f"error: runs/x holds a run with --images a, not --images b; {advice}\n"


def test_help_describes_every_study(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_status:
        run(monkeypatch, "--help")
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "- hqa: HQA, HAMs and VQ-VAE on MNIST" in lines
    assert {name for name in reproduce.STUDIES if any(line.startswith(f"- {name}: ") for line in lines)} == {
        *("hr-vqvae", "hqa", "selfvae", "sundae", "priors", "quantizers", "overfitting", "size64", "portraits")
    }
