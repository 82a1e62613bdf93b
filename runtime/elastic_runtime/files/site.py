"""Write a static site in its folder as one transaction: a kill at any moment leaves the old site or the new one.

All files but the page lie in one folder, named by what is in it, which moves to its place whole. The page, `index.html`, which names that
folder and lists its files, then takes the old page's place in one step: a browser never gets some files of each. Last, the old page's files
go. What no page lists is the user's and is never touched.

    with writing(folder) as draft:
        ...  # make files in draft.stage
        draft.commit(lambda name, files: ...)
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from elastic_runtime.contract.artifacts import FileEntry
from elastic_runtime.contract.bundle import MANIFEST, entry, readable
from elastic_runtime.errors import UsageError
from elastic_runtime.files import atomic, leftovers
from elastic_runtime.files.names import free, records, variants
from elastic_runtime.files.place import foreign, holding, unwritable

PAGE = "index.html"
STYLE = Path(__file__).with_suffix(".css")  # what all pages look like, the server's too; each adds its own
GENERATOR = "elastic-export web"
# What the page says about itself, and by which it is known as ours.
FACTS = re.compile(rb'<script type="application/json" id="site">(.*?)</script>', re.DOTALL)
# page(name, files): the page whose files lie in the folder `name`
Page = Callable[[str, Sequence[FileEntry]], bytes]


@dataclass(frozen=True)
class Standing:
    """What stands in a folder: the files that its page lists."""

    files: tuple[FileEntry, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A site that is being written: files are made in `stage`."""

    folder: Path
    partial: Path
    standing: Standing

    @property
    def stage(self) -> Path:
        return self.partial / leftovers.FILES

    def commit(self, page: Page) -> tuple[FileEntry, ...]:
        """Make `page` the folder's, with the files of the stage; return these, by where they lie.

        Raises: BundleError where the folder cannot be written. On any error it is as it was.
        """
        staged = [entry(self.stage, path) for path in sorted(self.stage.rglob("*")) if path.is_file()]
        digest = hashlib.sha256("".join(f"{each.sha256} {each.path}\n" for each in staged).encode()).hexdigest()
        name = next(name for name in variants(f"files-{digest[:12]}") if free(self.folder, name))
        files = tuple(msgspec.structs.replace(each, path=f"{name}/{each.path}") for each in staged)
        text, shown = page(name, files), FileEntry(path=PAGE, bytes=0, sha256="")
        try:
            for each in staged:
                atomic.flush(self.stage / each.path)
            leftovers.note(self.partial, [*files, *self.standing.files])
            try:
                os.rename(self.stage, self.folder / name)
                atomic.flush(self.folder)
                atomic.write(self.folder / PAGE, text, beside=self.partial)
            finally:  # an interruption may come between any two instructions: what lies on the disk decides
                done = _text(self.folder) == text
                old, new = (self.standing.files, files) if done else (files, self.standing.files)
                leftovers.discard(self.folder, old, kept=[*new, shown])
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return files


@contextlib.contextmanager
def writing(folder: Path, overwrite: bool = False) -> Iterator[Draft]:
    """Yield a draft of the site in `folder`, which nobody else can write meanwhile. Without a commit nothing has changed.

    Raises: as `standing`; BundleError where another run writes there, the place cannot be written, or the disk is full.
    """
    with holding(folder, "site of ours", lambda sole: standing(folder, overwrite)) as (partial, stands):
        yield Draft(folder, partial, stands)


def standing(folder: Path, overwrite: bool) -> Standing:
    """What stands in `folder`, if a site may be written there. Nothing is changed.

    Raises: BundleError where something stands there that is not ours; UsageError for a site of ours without `overwrite`.
    """
    with readable(folder):
        if not folder.exists():
            return Standing()
        text = _text(folder) if folder.is_dir() else None
        if text is None:
            if not folder.is_dir() or not leftovers.empty(folder):
                raise foreign(folder, "site of ours")
            return Standing()
    match = FACTS.search(text)
    try:
        content = msgspec.json.decode(match[1]) if match else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("generator") != GENERATOR or (folder / MANIFEST).exists():
        raise foreign(folder, "site of ours")
    if not overwrite:
        raise UsageError(f"{folder} holds a site: choose another -o/--output, or replace it with --overwrite")
    return Standing(tuple(records(content.get("files"))))


def _text(folder: Path) -> bytes | None:
    try:
        return (folder / PAGE).read_bytes()
    except FileNotFoundError:
        return None


def embedded(facts: object) -> str:
    """Facts as JSON that may stand in a page: no text in it can end its element."""
    return msgspec.json.encode(facts).decode().replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
