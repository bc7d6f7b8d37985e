"""`pack_sequences`: documents of a token column as rows of a fixed number of tokens."""

from __future__ import annotations

from tiercache.data.dataset import Dataset
from tiercache.data.output_spec import OutputSpec
from tiercache.data.packing import (
    BOUNDARIES,
    CU_SEQLENS,
    FillInMiddle,
    LongDocuments,
    PackMode,
    SequenceOptions,
    pack_records,
)


def pack_sequences(
    dataset: Dataset,
    column: str,
    length: int,
    *,
    mode: PackMode = "concatenate",
    long_documents: LongDocuments = "cut",
    eos: int | None = None,
    pad: int = 0,
    mask_borders: bool = False,
    fill_in_middle: FillInMiddle | None = None,
) -> Dataset:
    """Return a data set whose records are rows of `length` tokens, made of the documents of a token column.

    A batch of n rows has the entries

    - `column`, int64[n, length]: the tokens.
    - `labels`, int64[n, length]: the next token of the same document, also across a cut at the end of a row. -100 in
      padding and at the last position of a row whose document ends there.
    - `position_ids`, int64[n, length]: 0, 1, 2, ... in each piece of a document, and in the padding.
    - `document_ids`, int32[n, length]: number of the piece in its row, from 0; -1 in padding.
    - `cu_seqlens`, int32[m + 1], and `max_seqlen`, int: bounds of the m pieces (and paddings) of the flattened batch, 0
      to n * length, and the longest of them, for attention over sequences of varying length.

    `select_columns` leaves out what a model does not need. A loader shuffles, splits and resumes rows as it does
    records. Which documents share a row does not depend on the epoch, so all epochs have len() rows. Documents are
    packed in stored order within runs of blocks, each 64 rows or more; a list of record numbers is packed in stored
    order too. Joined data sets are packed one by one. Pack data sets before `mix`: its weights then count rows.

    In mode "concatenate" without fill-in-the-middle, this function reads the footers of all shards, and nothing else.
    Otherwise it reads the lengths of all documents once: the pages of 64 KiB that hold them, or the whole column if it
    is compressed. A pickle of the result contains the result of this reading.

    Args:
        dataset: Documents: a data set or a view, without a transform. Only `column` is read.
        column: Name of the column of tokens: `Ragged` of integers with one dimension. Nulls are empty documents.
        length: Tokens of a row, 2 to 2**24.
        mode: "concatenate": documents follow each other without gaps, and are cut where rows end. "best_fit": documents
            are not cut; the longest ones are placed first, each into the row where it leaves the least room.
            "separate": each document begins a row of its own.
        long_documents: In the modes that do not cut: whether to "cut" a document that is longer than a row, or to raise
            an "error" now.
        eos: End token, which is added to each document, also to an empty one. It must fit the stored dtype of the
            tokens. None: no token is added.
        pad: Token that fills a row behind its last piece.
        mask_borders: Whether the label of a document's last token is -100 also if another document follows in the row.
            Otherwise it is the first token of that document.
        fill_in_middle: Fill-in-the-middle. None: documents are served as they are stored.

    Raises:
        SchemaError: The column does not exist or has another type.
        ValueError: An argument is invalid; or a document is too long; or the data set is a mixture, has a transform, or
            is packed already.
        TypeError: An argument is of another type.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"pack_sequences() takes a tiercache.Dataset, got {dataset!r}")
    access = dataset.__tiercache__()
    if not access.is_plain or access.batch_transform is not None:
        raise ValueError(
            "pack_sequences() packs stored documents, and this data set has a transform, or its class overrides how "
            "records are read; LoaderOptions(batch_transform=) applies to packed rows"
        )
    if access.source.is_packed:
        raise ValueError("the data set is packed already")
    options = SequenceOptions(column, length, mode, long_documents, eos, pad, mask_borders, fill_in_middle)
    rows = pack_records(access.source, options)
    return dataset._derive(rows, OutputSpec({CU_SEQLENS: BOUNDARIES}))  # noqa: SLF001 -- of this package
