"""A server that tests talk to."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Running:
    """A server that listens at `url`; `engine` is what draws behind it."""

    url: str
    engine: Any
    clients: list[Any] = field(default_factory=list)

    def client(self, key: str = "none", **options: Any) -> Any:
        """The official client of the OpenAI API, closed when the server ends."""
        import openai

        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options))
        return self.clients[-1]

    def http(self, **options: Any) -> Any:
        """A plain client, as curl is one."""
        import httpx2

        return httpx2.Client(base_url=self.url, timeout=60.0, **options)


# serving(**settings) -> a context in which it runs
Serving = Callable[..., "contextlib.AbstractContextManager[Running]"]
