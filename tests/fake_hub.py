"""A Hugging Face hub in memory, in the place of huggingface_hub's own interface."""

import dataclasses
import fnmatch
import inspect
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

TOKEN = "hf_" + "s3cret" * 5
REAL = huggingface_hub.HfApi


@dataclasses.dataclass
class Repository:
    """Files by name, and whether others see them."""

    private: bool = False
    files: dict[str, bytes] = dataclasses.field(default_factory=lambda: {".gitattributes": b""})


@dataclasses.dataclass
class FakeHub:
    """Its repositories, its one account, and what fails.

    Attributes:
        repositories: by name.
        account: what `whoami` says.
        fails: name of a call -> what it raises.
        calls: names of the calls, in order.
    """

    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    account: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "type": "user",
            "name": "ann",
            "orgs": [{"name": "Lab"}],
            "auth": {"accessToken": {"role": "write"}},
        }
    )
    fails: dict[str, Exception] = dataclasses.field(default_factory=dict)
    calls: list[str] = dataclasses.field(default_factory=list)
    endpoint: str = "https://hub.test"

    def install(self, monkeypatch: pytest.MonkeyPatch, *, token: str | None = TOKEN) -> "FakeHub":
        """Answer instead of the hub."""
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        return self

    def __getattribute__(self, name: str) -> Any:
        """Note every call of the hub's interface."""
        found = super().__getattribute__(name)
        if callable(found) and not name.startswith("_") and name != "install":
            return super().__getattribute__("_noted")(name, found)
        return found

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(getattr(REAL, name)).bind(self, *args, **kwargs)  # as it is there
            self.calls.append(name)
            if name in self.fails:
                raise self.fails[name]
            return call(*args, **kwargs)

        return noted

    def whoami(self) -> dict[str, Any]:
        """The account."""
        return self.account

    def model_info(self, name: str) -> SimpleNamespace:
        """Visibility and files."""
        if name not in self.repositories:
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=response)
        found = self.repositories[name]
        files = [SimpleNamespace(rfilename=file) for file in found.files]
        return SimpleNamespace(private=found.private, siblings=files)

    def hf_hub_download(self, name: str, file: str, *, local_dir: str) -> str:
        """Write a file into a folder."""
        path = pathlib.Path(local_dir) / file
        path.write_bytes(self.repositories[name].files[file])
        return str(path)

    def create_repo(self, name: str, *, private: bool | None) -> None:
        """Make an empty repository, once."""
        assert name not in self.repositories
        self.repositories[name] = Repository(private=bool(private))

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str | pathlib.Path,
        commit_message: str,
        delete_patterns: list[str],
    ) -> None:
        """Remove what matches, then add what the folder holds."""
        assert commit_message
        files = self.repositories[repo_id].files
        for name in list(files):
            matched = any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns)
            if matched and name != ".gitattributes":
                del files[name]
        for path in pathlib.Path(folder_path).iterdir():
            files[path.name] = path.read_bytes()
