#ifndef TC_PACKING_H
#define TC_PACKING_H
/* Packing: rows of a fixed number of tokens that are made of documents of any length.
 *
 * tc_pack plans the rows of a unit, which is the documents of some consecutive stored blocks: each row is a list of
 * pieces of documents. tc_gather_packed writes rows of units into a batch's memory. A document is its stored tokens,
 * followed by the end token if there is one. Both functions are pure: equal inputs give equal rows, on every machine.
 * They take no locks and allocate nothing. */
#include "gather.h"

/* Kind of a stream whose rows are packed. tc_stream: `from` is one of the outputs below, `to` is TC_AS_IS, and `width` is
 * the size of an output row in bytes. tc_source: `values` is the address of a tc_packed_unit. Nothing is checked while
 * rows are gathered: the caller has checked the pages of all documents. */
enum { TC_PACKED = 5 };

enum {
    TC_TOKENS,       /* int64: the tokens; `pad` after the last piece. */
    TC_LABELS,       /* int64: the next token of the document, or TC_IGNORED, also if the mask of that token is 0. */
    TC_POSITION_IDS, /* int64: positions from 0 in each piece, and in the padding. */
    TC_DOCUMENT_IDS, /* int32: number of the piece in its row; -1 for padding. */
    TC_N_OUTPUTS
};

#define TC_IGNORED (-100) /* torch's cross_entropy ignores this label. */

enum {
    TC_CONCATENATE, /* Documents follow each other without gaps, and are cut where rows end. */
    TC_BEST_FIT,    /* Documents that fit a row are not cut: the longest first, each into the row that it fits best. */
    TC_SEPARATE     /* Each document begins a row of its own. */
};

typedef struct {
    uint32_t length; /* Tokens of a row, 1 or more. */
    uint32_t mode;
    uint32_t cuts_long;     /* 1: documents longer than a row are cut, even if the mode does not cut others. */
    uint32_t has_end;       /* 1: a document ends with the token `end`. */
    uint32_t masks_borders; /* 1: the label of a document's last token is TC_IGNORED, also if another document follows. */
    uint32_t dtype;         /* Stored dtype of the tokens (cast.h): an integer whose values all fit int64. */
    uint32_t mask_dtype;    /* Stored dtype of the masks, as dtype, or TC_BOOL; TC_AS_IS: documents have no masks. */
    int64_t pad, end;
} tc_packing;

enum {
    TC_ENDS = 1,      /* The end token follows the stored tokens. */
    TC_GOES_ON = 2,   /* The stored tokens of the document go on behind this piece. */
    TC_END_LATER = 4  /* The stored tokens end here; the end token is in the next row. */
};

/* A piece of a document in a row. */
typedef struct {
    const uint8_t *from; /* Its first stored token. */
    const uint8_t *mask; /* The mask of that token; undefined without masks. */
    uint32_t n;          /* Number of stored tokens; 0 if only the end token is left. */
    uint32_t start;      /* Position of its first token in the row. */
    uint32_t document;   /* Index of the document in its unit. */
    uint32_t flags;
} tc_packed_piece;

typedef struct {
    const tc_packed_piece *pieces;
    const uint32_t *first_piece; /* [n_rows + 1] */
    const tc_packing *packing;
} tc_packed_unit;

/* The documents of a unit. `lengths` are 0 or more and below 2^32. A mask has one number for each stored token; the end
 * token has that of the last stored token, or 0. */
typedef struct {
    const int64_t *lengths;
    const uint64_t *addresses; /* Address of each document's first token; may be NULL if no pieces are written. */
    const uint64_t *masks;     /* Address of each document's mask; may be NULL if addresses is, or without masks. */
    size_t n;
} tc_documents;

/* Number of 32-bit words of scratch memory that tc_pack needs for n documents. */
size_t tc_pack_scratch_words(const tc_packing *packing, size_t n);

/* Plan the rows of a unit. Returns the number of rows, or -1 - d if document d is longer than a row and is not cut.
 * pieces: NULL only counts the rows; otherwise there is room for n documents + n rows pieces, and for n rows + 1 numbers
 * in first_piece. scratch: memory of tc_pack_scratch_words, whose contents are undefined. */
int64_t tc_pack(const tc_packing *packing, const tc_documents *documents, uint32_t *scratch, tc_packed_piece *pieces, uint32_t *first_piece);

/* Positions in each row at which pieces and padding begin, followed by the length of the row: the cumulative sequence
 * lengths of the row. offsets: [n_rows + 1] First boundary of each row. counts: [n_rows] Number of boundaries of each
 * row. Returns the number of boundaries, at most the number of pieces + 2 * n_rows. */
size_t tc_boundaries(const tc_packed_unit *unit, size_t n_rows, int32_t *boundaries, int64_t *offsets, int32_t *counts);

/* tc_gather for a TC_PACKED stream. */
void tc_gather_packed(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink);

/* Join the boundaries of the n rows of a batch (offsets: [n + 1]) to the cumulative sequence lengths of the flattened
 * batch, out: [offsets[n] - n + 1], which may begin where the boundaries begin. Returns the longest sequence. */
int32_t tc_join_boundaries(const int32_t *boundaries, const int64_t *offsets, size_t n, int32_t length, int32_t *out);


#endif
