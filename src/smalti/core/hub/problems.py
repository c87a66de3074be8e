"""Problems with the hub as one line each: what is wrong, and what to do."""

import os

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from smalti.core.errors import one_line
from smalti.core.hub.ids import HubId, RepoType

HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)
"""The exceptions of `huggingface_hub`, with those of the HTTP library below it, whose name depends on the version.
Failed uploads of large files are RuntimeErrors, and refused cards ValueErrors."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_WORDS = {"model": "model", "dataset": "data set"}


def describe_problem(error: BaseException, hub_id: HubId, kind: RepoType) -> str:
    """Returns the reason of an error that `huggingface_hub` raised, and what to do about it."""
    inner = error.__cause__
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(inner, HUB_ERRORS):
        return describe_problem(inner, hub_id, kind)
    if isinstance(error, HfHubHTTPError):
        return _describe_answer(error, hub_id, kind)
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set and {hub_id.repo} is not in the cache; unset HF_HUB_OFFLINE"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename} cannot be written ({os.strerror(error.errno)}); make room, or set HF_HOME"
    if isinstance(error, (HUB_ERRORS[0], LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return f"{constants.ENDPOINT} cannot be reached ({one_line(inner or error)}); check the network, or HF_ENDPOINT"
    return f"{one_line(error)}; see the documentation of `huggingface_hub`"


def _describe_answer(error: HfHubHTTPError, hub_id: HubId, kind: RepoType) -> str:
    """Returns what an answer of the hub with an error's status means."""
    status, endpoint = error.response.status_code, constants.ENDPOINT
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{hub_id.repo}"
    if isinstance(error, GatedRepoError):
        return f"access to {hub_id.repo} must be granted first; ask for it at {page}, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id.repo} has no revision {hub_id.revision}; give a branch, a tag or a commit"
    refused = status == 401 and "credentials" in f"{error.server_message} {error}".lower()
    if refused and get_token():
        return f"{endpoint} refuses the token; {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        private = "the token may not read it" if get_token() else "it is private, and no token is set"
        return f"{endpoint} has no {_WORDS[kind]} {hub_id.repo}, or {private}; check the name, or {LOG_IN}"
    if status == 403:
        said = error.server_message or "403 Forbidden"
        return f"the token may not do this ({one_line(said)}); use one with write access to {hub_id.repo}"
    said = error.server_message or error
    return f"{endpoint} answers with status {status} ({one_line(said)}); try again later"
