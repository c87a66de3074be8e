"""Tests of the recorded git commit."""

from smalti.core import provenance


def test_git_commit_is_that_of_smaltis_own_checkout(tmp_path, monkeypatch):
    """A wheel installed inside another repository must not record that repository's commit."""
    git = provenance._git
    assert git("init", "-q", str(tmp_path)) is None  # prints nothing
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").write_text("")
    assert provenance.git_commit() is None
    assert git("add", "provenance.py") is None
    assert git("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "one") is None
    commit = provenance.git_commit()
    assert len(commit) == 12
    (tmp_path / "provenance.py").write_text("changed")
    assert provenance.git_commit() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit() is None
