class Distance:
    """What finds out whether the consumer's core is far from a worker's (csrc/distance.h), for tests."""

    def ask(self) -> None:
        """As the consumer does, every so many batches."""

    def mark(self) -> None:
        """As a worker does."""

    def look(self) -> None:
        """As the consumer does, with every batch."""

    def learn(self, is_far: bool) -> None:
        """An answer."""

    @property
    def step(self) -> int:
        """0: idle, 1: asked for, 2: written."""

    @property
    def is_far(self) -> bool:
        """What is held true."""
