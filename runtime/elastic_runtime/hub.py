"""Repositories of the Hugging Face hub, written `org/name` or `org/name@revision`. No other file imports huggingface_hub.

What a name holds is looked up in the hub's own cache, or downloaded into it: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are its
client's to honour, and so are connections that break off: it takes them up again, and keeps every file that came whole.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic_runtime.errors import MissingError, UsageError

EXTRA = "pip install 'elastic-export[hub]'"
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?")
MAIN = "main"
UNAUTHORISED, FORBIDDEN = 401, 403


@dataclass(frozen=True)
class Repository:
    """A repository of models at a revision: a branch, a tag or a commit."""

    id: str
    revision: str = MAIN

    def __str__(self) -> str:
        return self.id if self.revision == MAIN else f"{self.id}@{self.revision}"

    @property
    def name(self) -> str:
        """Its name without the owner's."""
        return self.id.partition("/")[2]

    def at(self, snapshot: Path) -> "Repository":
        """The very commit that a snapshot is of."""
        return replace(self, revision=snapshot.name)


def parsed(name: str) -> Repository | None:
    """The repository of this name; None for what is no such name."""
    match = _NAME.fullmatch(name)
    return Repository(match[1], match[2] or MAIN) if match else None


def named(name: str | os.PathLike[str]) -> Repository | None:
    """The repository that a name stands for; None for a file or folder that is here, and for what is no such name."""
    text = name if isinstance(name, str) else Path(name).as_posix()
    return None if Path(text).exists() else parsed(text)


def snapshot(repository: Repository, patterns: Sequence[str]) -> Path:
    """The folder of the cache with those files that match `patterns` (fnmatch's), downloaded where they are not there.

    Raises: MissingError without huggingface_hub, or without the hub where the cache lacks something; UsageError for a repository or
        revision that there is not, is gated, or that the token may not read.
    """
    client = _client(str(repository))
    with _refusals(client, repository):
        return Path(client.snapshot_download(repository.id, revision=repository.revision, allow_patterns=list(patterns)))


def files(repository: Repository) -> list[str]:
    """Names of all files of a repository.

    Raises: as `snapshot`; MissingError where the hub is out of reach.
    """
    client = _client(str(repository))
    with _refusals(client, repository):
        return list(client.HfApi().list_repo_files(repository.id, revision=repository.revision))


def read(repository: Repository, file: str) -> bytes | None:
    """A small file of a repository, or None where it has no such file."""
    folder = snapshot(repository, [file])
    return (folder / file).read_bytes() if (folder / file).is_file() else None


@dataclass(frozen=True)
class Commit:
    """What was pushed: the address of the commit, and files that were written and taken away."""

    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]


def created(repository: Repository, private: bool) -> Repository:
    """The repository, made where there is none, and its revision, a branch, likewise, at the commit that it stands at now.

    Raises: as `snapshot`; UsageError where the token may not write there.
    """
    client = _client(str(repository))
    with _refusals(client, repository):
        api = client.HfApi()
        api.create_repo(repository.id, private=private, exist_ok=True)
        if repository.revision != MAIN:
            api.create_branch(repository.id, branch=repository.revision, exist_ok=True)
        return replace(repository, revision=api.model_info(repository.id, revision=repository.revision).sha)


def push(repository: Repository, parent: Repository, content: Mapping[str, Path | bytes], removed: Sequence[str], message: str) -> Commit:
    """Write files, and take others away, in one commit on top of `parent`: all of it is there afterwards, or nothing is.

    Raises: as `created`; UsageError where somebody else has pushed since.
    """
    client = _client(str(repository))
    operations: list[Any] = [
        client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=value if isinstance(value, bytes) else str(value))
        for name, value in content.items()
    ]
    operations += [client.CommitOperationDelete(path_in_repo=name) for name in removed]
    with _refusals(client, repository):
        commit = client.HfApi().create_commit(
            repository.id, operations, commit_message=message, revision=repository.revision, parent_commit=parent.revision
        )
    return Commit(str(commit.commit_url), tuple(content), tuple(removed))


def _client(name: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingError(f"there is no folder {name} here, and names on the hub need huggingface_hub ({error}): {EXTRA}") from error
    return huggingface_hub


@contextmanager
def _refusals(client: Any, repository: Repository) -> Iterator[None]:
    """What the client raises, in words of ours."""
    errors, constants = client.errors, client.constants
    id, login = repository.id, "log in with: hf auth login, or set HF_TOKEN"
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"there is no folder {repository} here, and it is no name of a repository: {error}") from None
    except errors.GatedRepoError:
        raise UsageError(f"{id} is gated: accept its terms at {constants.ENDPOINT}/{id}, and {login}") from None
    except errors.RepositoryNotFoundError:
        whose = "it is private and your token may not read it" if client.get_token() else f"it is private: {login}"
        raise UsageError(f"there is no folder {id} here, and no repository of that name on the hub, or {whose}") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{id} has no revision {repository.revision!r}: see {constants.ENDPOINT}/{id}/tree/{MAIN}") from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise MissingError(
                f"there is no folder {id} here, HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not have all of "
                f"{repository} that is needed: download it once without HF_HUB_OFFLINE"
            ) from None
        raise MissingError(f"{repository} is not whole in the cache, and the hub is out of reach ({_why(error.__cause__)})") from None
    except errors.HfHubHTTPError as error:
        raise _refused(error, repository, login) from None
    except errors.OfflineModeIsEnabled:
        raise MissingError(f"HF_HUB_OFFLINE is set, and {repository} cannot be reached without the hub: unset it") from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        root = error
        while isinstance(root, RuntimeError) and root.__cause__:  # "error while uploading", which hides what it was
            root = root.__cause__
        if isinstance(root, errors.HfHubHTTPError):
            raise _refused(root, repository, login) from None
        if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # a disk's, though it names no file
            cache = constants.HF_HUB_CACHE
            what = f"cannot download {repository} into {cache} ({os.strerror(root.errno)})"
            raise UsageError(f"{what}: make room there, or set HF_HUB_CACHE to a folder on another disk") from None
        if not isinstance(root, errors.HTTPError | OSError) or (isinstance(root, OSError) and root.errno is not None and root.filename):
            raise  # no connection's: a disk's, which says it itself
        again = "try again, and what came whole is not fetched twice"
        raise MissingError(f"the connection to the hub for {repository} broke off ({_why(root)}): {again}") from None


def _refused(error: Any, repository: Repository, login: str) -> UsageError | MissingError:
    """A status that has no class of its own."""
    status, reason = error.response.status_code, _why(error)
    if status == UNAUTHORISED:
        return UsageError(f"the hub does not take the token that was sent for {repository}: {login}")
    if status == FORBIDDEN:
        return UsageError(f"your token may not do that with {repository} ({reason}): take one that may write there")
    if status in (409, 412):
        return UsageError(f"somebody else has pushed to {repository} meanwhile: look at it, and push again")
    return MissingError(f"the hub answers {status} for {repository} ({reason}): try again later")


def _why(error: BaseException | None) -> str:
    """A library's message on one line."""
    text = getattr(error, "server_message", None) or str(error or "")
    return " ".join(text.split())[:200] or type(error).__name__
