"""Files by URL, with fsspec: read where they are, put there whole.  What is secret in a URL is never shown."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from llmjax.errors import RequestError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# Who one is, and what follows a question mark: keys, signatures, tokens.
_SECRETS = re.compile(r"(?<=://)[^/@\s]*(?=@)|(?<=\?)[^\s:#]+")
_BUFFER = 1 << 20


def is_url(path: object) -> bool:
    """Whether it is a URL; a path of this machine is none."""
    return isinstance(path, str) and _URL.match(path) is not None


def local(path: str) -> str:
    """The path that a ``file://`` URL stands for; all else as it is."""
    return unquote(path[len("file://") :]) if isinstance(path, str) and path.lower().startswith("file:///") else path


def shown_url(path: str) -> str:
    """As it may be printed and kept."""
    return _SECRETS.sub("***", path) if is_url(path) else path


def file_name(path: str) -> str:
    """Its last part, by which one tells what kind of file it is."""
    return path.split("?")[0].rpartition("/")[2] if is_url(path) else Path(path).name


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedReader]:
    """A file of this machine or of another, for reading; what goes wrong with it later is an OSError.

    Raises:
      OSError: it cannot be opened.
      RequestError: it is a URL, and what reads such is not installed.
    """
    if not isinstance(path, str) or not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    with _told(path):
        file = _fsspec().open(path, "rb").open()
    remote: Any = _Remote(file, path)
    with contextlib.closing(file), io.BufferedReader(remote, _BUFFER) as reader:
        yield reader


def exists(url: str) -> bool:
    """Whether there is a file.

    Raises:
      OSError, RequestError: see ``opened``.
    """
    with _told(url):
        files, path = _fsspec().core.url_to_fs(url)
        return files.exists(path)


def put(source: Path, url: str) -> None:
    """Copies a file of this machine there, in one go where the storage can.

    Raises:
      OSError, RequestError: see ``opened``.
    """
    with _told(url):
        files, path = _fsspec().core.url_to_fs(url)
        files.put_file(str(source), path)


def _fsspec() -> Any:
    try:
        import fsspec
        import fsspec.core
    except ImportError:
        raise RequestError("URLs are read and written with fsspec: pip install 'llmjax[urls]'") from None
    return fsspec


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Whatever a storage's client raises, as an OSError without secrets."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        for secret in (part for found in _SECRETS.findall(url) for part in re.split("[:&=]", found)):
            if len(secret) > 3:  # of a shorter one nobody could read the rest
                text = text.replace(secret, "***")
        if isinstance(error, FileNotFoundError):
            text = "No such file"
        raise OSError(f"{type(error).__name__}: {text}" if not isinstance(error, OSError) else text) from None


class _Remote(io.RawIOBase):
    def __init__(self, file: IO[bytes], url: str):
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _told(self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _told(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
