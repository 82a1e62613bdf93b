"""The thread that reads prompts beside the one that draws, so that what is in flight goes on meanwhile.

One prompt is read at a time, of all models: text encoders take much memory, and are closed again after each.
"""

import threading
from collections.abc import Callable

from elastic_runtime.device import Clock
from elastic_runtime.drawing.drawing import Texts
from elastic_serve.served import Prompt

# on_read(prompt, what it was read as or why it was not, seconds), on the reader's thread
OnRead = Callable[[Prompt, "Texts | Exception", float], None]


class Reader:
    """Reads what `following()` names, whenever `changed` is notified, until it is closed.

    `following` is called with `changed` held, `read` and `on_read` without.
    """

    def __init__(
        self,
        changed: threading.Condition,
        following: Callable[[], Prompt | None],
        read: Callable[[Prompt], Texts],
        on_read: OnRead,
        clock: Clock,
    ):
        self._changed, self._following, self._read, self._on_read, self._clock = changed, following, read, on_read, clock
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, patience: float | None = None) -> bool:
        """End, after the prompt that is being read; returns whether it has ended, where that is waited for with `patience` in seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (prompt := self._following()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            begun = self._clock()
            answer: Texts | Exception
            try:
                answer = self._read(prompt)
            except Exception as error:  # of those alone who ask for it
                answer = error
            self._on_read(prompt, answer, self._clock() - begun)
