"""Hub ids, and names without local folders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.hub.ids import HubId, find_hub_id, parse_target
from smalti.core.hub.public_names import public_command, public_path, public_values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("me/photos", ("me/photos", None, "")),
        ("me/photos/", None),
        ("me/photos@v1", ("me/photos", "v1", "")),
        ("me/photos@0a1b2c/tokenizer", ("me/photos", "0a1b2c", "tokenizer")),
        ("me/photos/level-0/tokenizer", ("me/photos", None, "level-0/tokenizer")),
        ("me/photos@refs/pr/3", ("me/photos", "refs/pr/3", "")),
        ("me/photos@refs/pr/3/sub", ("me/photos", "refs/pr/3", "sub")),
        ("me/photos@wip%2Fnew/sub", ("me/photos", "wip/new", "sub")),
        *(
            (text, None)
            for text in (
                "photos",
                "runs/photos",
                "runs/priors/photos",
                "",
                "/me/photos",
                "./me/photos",
                "../me",
                "~/photos",
                "me//photos",
            )
        ),
        *(
            (text, None)
            for text in ("me/photos/../x", "me/photos/*", "me/photos@", "me/ph otos", "me/photos\0", "a@b/c")
        ),
        *((text, None) for text in ("me/photos.git", "me/pho--tos", "-me/photos", "me/photos\\x", "n/" * 3000)),
    ],
)
def test_forms_of_hub_ids(text, parts):
    found = find_hub_id(text)
    assert (found and (found.repo, found.revision, found.folder)) == parts


@given(
    st.from_regex(r"[a-z]{1,5}/[a-z0-9]{1,5}", fullmatch=True),
    st.none() | st.from_regex(r"[a-z0-9]{1,4}(/[a-z0-9]{1,4})?", fullmatch=True),
    st.just("") | st.from_regex(r"[a-z0-9]{1,4}(/[a-z0-9]{1,4}){0,2}", fullmatch=True),
)
def test_hub_ids_are_written_as_they_are_read(repo, revision, folder):
    hub_id = HubId(repo, revision, folder)
    assert find_hub_id(str(hub_id)) == hub_id


def test_the_branch_is_given_once():
    assert parse_target("me/photos", "v2") == parse_target("me/photos@v2") == HubId("me/photos", "v2")
    with pytest.raises(UserError, match="two branches; give one"):
        parse_target("me/photos@v1", "v2")
    with pytest.raises(UserError, match="photos is not a hub id; give owner/name"):
        parse_target("photos")


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("/home/jane/photos", "photos"),
        ("/home/jane/photos/*.png", "*.png"),
        ("~/photos", "photos"),
        ("../clients/acme", "acme"),
        ("clients/acme/2026", "2026"),
        ("C:\\Users\\jane\\photos", "photos"),
        ("\\\\server\\share\\photos", "photos"),
        ("/", "images"),
        *((name, name) for name in ("portraits", "me/data@cfg:train", "runs/tokenizers/photos", "https://a.b/c/d")),
    ],
)
def test_public_paths_have_no_local_folders(path, public, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_path(path) == public


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://b.s3.amazonaws.com/x.tar?X-Amz-Signature=SECRET", "https://b.s3.amazonaws.com/x.tar"),
        ("https://jane:SECRET@host/x-{00..11}.tar#SECRET", "https://host/x-{00..11}.tar"),
        ("HTTPS://SECRET@host", "HTTPS://host"),
        ("hf://datasets/me/x@main/a.tar", "hf://datasets/me/x@main/a.tar"),
        ("file:///home/SECRET/my photos.tar", "my photos.tar"),
        ("zip://a/b.png::/home/SECRET/x.zip", "zip://a/b.png::x.zip"),
        (
            "https://a.b/x.tar, https://jane:SECRET@host/y.tar, /home/SECRET/z",
            "https://a.b/x.tar, https://host/y.tar, z",
        ),
        ("/home/SECRET/https://a", "a"),
    ],
)
def test_public_urls_have_no_secrets_and_local_ones_no_folders(url, public):
    assert public_path(url) == public
    assert public_values({"image_source": url, "held_out": url}) == {"image_source": public, "held_out": public}
    assert "SECRET" not in public_command(f"smalti build-latents '--images={url}' --held-out '{url}'")
    assert "SECRET" not in public_values({"reason": f"row 3 of {url.replace('my photos', 'photos')}: empty"})["reason"]


def test_a_relative_path_that_exists_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "photos").mkdir(parents=True)
    assert public_path("acme/photos") == "photos"


def test_commands_are_those_of_an_installed_smalti():
    assert public_command("train_tokenizer.py --images '/home/jane/my photos' --out=/data/runs/a --widths 4 8") == (
        "smalti train-tokenizer --images 'my photos' --out=a --widths 4 8"
    )
    assert public_command("smalti build-latents --tokenizer runs/tokenizers/a") == (
        "smalti build-latents --tokenizer runs/tokenizers/a"
    )
    assert public_command("my_program.py --fast") == "my_program.py --fast"
    assert public_values({"command": "build_latents.py --images 'a b'"}) == {
        "command": "build_latents.py --images 'a b'"
    }
    assert public_values({"command": "build_latents.py --images /a/b"}) == {"command": "build_latents.py --images b"}
    assert public_command("broken ' /home/jane/x") == "broken ' x"


def test_names_of_classes_stay():
    before = {
        "image_source": "/home/jane/photos",
        "label_names": ["/m/0abc", "~/x"],
        "command": "smalti x --images /home/jane/photos",
        "nested": {"reasons": ["cannot read /home/jane/photos/a.png (row 3)"], "number": 3},
    }
    assert public_values(before) == {
        "image_source": "photos",
        "label_names": ["/m/0abc", "~/x"],
        "command": "smalti x --images photos",
        "nested": {"reasons": ["cannot read a.png (row 3)"], "number": 3},
    }
    assert public_values({"text": "photos at /home/jane/a.png"}) == {"text": "photos at a.png"}
    assert public_values({"text": "photos/a.png (row 3), 3/4"}) == {"text": "photos/a.png (row 3), 3/4"}
