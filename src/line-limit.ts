/**
 * UTF-8 bytes of the JSON of one event of a stream, a chunk or a change of status, at most. Many clients read lines into a
 * buffer of 64 KiB and fail on a longer one (Go's `bufio.Scanner` is one of them), and a WebSocket's message puts some more
 * around it. So a line of a stream, its `data:` included, stays below 48 KiB.
 */
export const MOST_LINE_BYTES = 48 * 1024 - 16;
