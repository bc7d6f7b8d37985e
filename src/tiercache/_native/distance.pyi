class Distance:
    """A core distance measurement (csrc/core_distance.h), for tests."""

    def ask(self) -> None:
        """Request a measurement, as the consumer does every few batches."""

    def mark(self) -> None:
        """Write the lines, as a worker does."""

    def look(self) -> None:
        """Read the lines and update the estimate, as the consumer does with every batch."""

    def learn(self, is_far: bool) -> None:
        """Add one measurement."""

    @property
    def step(self) -> int:
        """State: 0 idle, 1 requested, 2 written."""

    @property
    def is_far(self) -> bool:
        """Present estimate."""
