"""What can be chosen, for a command line that loads no library to say it."""

FORMATS = ("csv", "tsv", "jsonl", "text", "parquet", "datasets")  # of an input
STREAMED = ("csv", "tsv", "jsonl", "text")  # those that a pipe can carry
MEASURES = ("entropy", "mutual_information", "batchbald")  # that rows are selected by
