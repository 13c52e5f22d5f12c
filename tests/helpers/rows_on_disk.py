"""Rows written in the formats that tables are read from, and lines read again."""

import csv
import gzip
import json


def write_rows(path, rows):
    """Write ``rows`` to a file of any kind that is read (.parquet: also an Arrow table); the path as text."""
    lines = "" if path.suffix in (".csv", ".parquet") else "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    return str(path)


def read_rows(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
