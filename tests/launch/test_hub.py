"""Pushing: refused before any work where it cannot succeed; nothing of others is overwritten."""

import json
import pathlib
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from r1re_jax.launch.hub import HubError, check_push, push
from r1re_jax.policy_files import save_policy
from tests.fake_hub import TOKEN, FakeHub, Repository
from tests.tiny import tiny_policy

NAME = "ann/policy"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub without repositories, and somebody logged in."""
    return FakeHub().install(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An export."""
    place = tmp_path_factory.mktemp("export") / "policy"
    save_policy(tiny_policy(), place, card="# Policy\n")
    return place


def names(folder: pathlib.Path) -> set[str]:
    """What a repository holds after a push."""
    return {path.name for path in folder.iterdir()} | {".gitattributes"}


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_made_and_filled(
    hub: FakeHub, folder: pathlib.Path, private: bool
) -> None:
    check_push(NAME, private=private)
    assert not hub.repositories, "checking writes nothing"
    assert push(folder, NAME, private=private) == f"https://hub.test/{NAME}"
    assert hub.repositories[NAME].private is private
    assert set(hub.repositories[NAME].files) == names(folder)
    assert hub.repositories[NAME].files["README.md"] == b"# Policy\n"


def test_an_export_replaces_an_export_and_leaves_no_old_weights(
    hub: FakeHub, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    save_policy(tiny_policy(1), tmp_path / "old", max_shard_bytes=20_000)
    push(tmp_path / "old", "lab/policy")
    assert "model.safetensors.index.json" in hub.repositories["lab/policy"].files
    hub.repositories["lab/policy"].files["notes.txt"] = b"mine"
    push(folder, "lab/policy")
    assert set(hub.repositories["lab/policy"].files) == names(folder) | {"notes.txt"}


FOREIGN = {
    "weights": {"model.safetensors": b"w"},
    "another's model": {"config.json": b"{}", "r1re.json": b"{}"},
    "saved anew by others": {"config.json": json.dumps({"producer": "r1re_jax"}).encode()},
    "no JSON": {"config.json": b"{", "r1re.json": b"{}"},
    "a list": {"config.json": b"[]", "r1re.json": b"{}"},
    "a card": {"README.md": b"soon"},
    "many": {f"{i}.txt": b"" for i in range(9)},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_no_export_wrote_is_not_overwritten(
    hub: FakeHub, folder: pathlib.Path, files: dict[str, bytes]
) -> None:
    hub.repositories[NAME] = Repository(files={".gitattributes": b"", **files})
    with pytest.raises(HubError, match=f"{NAME} on the hub holds what no export wrote") as caught:
        check_push(NAME)
    assert "--push_overwrite" in str(caught.value) and ".gitattributes" not in str(caught.value)
    with pytest.raises(HubError, match="nothing is overwritten"):
        push(folder, NAME)
    assert hub.repositories[NAME].files == {".gitattributes": b"", **files}
    check_push(NAME, overwrite=True)
    push(folder, NAME, overwrite=True)
    assert set(hub.repositories[NAME].files) == names(folder), "nothing foreign is left"


def test_an_empty_repository_is_filled(hub: FakeHub, folder: pathlib.Path) -> None:
    hub.repositories[NAME] = Repository(private=True)
    push(folder, NAME, private=True)
    assert set(hub.repositories[NAME].files) == names(folder)


def test_private_weights_never_go_into_a_public_repository(
    hub: FakeHub, folder: pathlib.Path
) -> None:
    hub.repositories[NAME] = Repository()
    for overwrite in (False, True):
        with pytest.raises(HubError, match="is there and public"):
            check_push(NAME, private=True, overwrite=overwrite)
        with pytest.raises(HubError, match="is there and public"):
            push(folder, NAME, private=True, overwrite=overwrite)
    assert set(hub.repositories[NAME].files) == {".gitattributes"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "policy",
        "/policy",
        "ann/",
        "a/b/c",
        "ann/po licy",
        "ann/-policy",
        "ann/a--b",
        "ann/x.git",
    ],
)
def test_a_bad_name_is_refused_before_anything_is_asked(hub: FakeHub, name: str) -> None:
    with pytest.raises(HubError, match="is no name on the hub"):
        check_push(name)
    assert hub.calls == []


def test_nobody_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub().install(monkeypatch, token=None)
    with pytest.raises(HubError, match="nobody is logged in.*hf auth login.*HF_TOKEN"):
        check_push(NAME)
    assert hub.calls == []


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        check_push(NAME)
    assert hub.calls == []


def test_a_token_that_only_reads(hub: FakeHub) -> None:
    hub.account["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(HubError, match="the token of ann may only read"):
        check_push(NAME)


def test_an_owner_that_the_account_does_not_belong_to(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="ann may not write under bob; expected one of ann, Lab"):
        check_push("bob/policy")
    check_push("LAB/policy")
    hub.account["type"] = "service"  # of which the hub does not say where it may write
    check_push("bob/policy")


def failure(message: str) -> HfHubHTTPError:
    """An error as the hub's interface raises them."""
    return HfHubHTTPError(message, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("call", ["whoami", "model_info", "create_repo", "upload_folder"])
def test_what_the_hub_refuses_is_told_without_the_token(
    hub: FakeHub, folder: pathlib.Path, call: str
) -> None:
    header = f"Illegal header value b'Bearer {TOKEN}'; Bearer odd-token; {TOKEN}"
    hub.fails[call] = failure(header)
    with pytest.raises(HubError) as caught:
        push(folder, NAME)
    message = str(caught.value)
    assert "Illegal header value b'Bearer <token>'; Bearer <token> <token>" in message
    assert TOKEN not in message and caught.value.__suppress_context__
    # The export is not lost, and the message says how to go on.
    assert f"The export is in {folder}" in message
    assert f"hf upload {NAME} {folder} ." in message


def test_a_closed_repository(hub: FakeHub, folder: pathlib.Path) -> None:
    response = SimpleNamespace(headers={}, request=None)
    hub.fails["model_info"] = GatedRepoError("gated", response=response)
    with pytest.raises(HubError, match="is there and closed to this account"):
        check_push(NAME)


def test_a_repository_that_changed_meanwhile_is_looked_at_again(
    hub: FakeHub, folder: pathlib.Path
) -> None:
    check_push(NAME)
    hub.repositories[NAME] = Repository(files={"theirs.bin": b"1"})
    with pytest.raises(HubError, match="theirs.bin"):
        push(folder, NAME)
    assert hub.repositories[NAME].files == {"theirs.bin": b"1"}
