"""Readers for the files of wandb and TensorBoard."""

import json
import struct
import time

from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record


def wandb_records(file):
    """Return the records of a closed `.wandb` file; wait for it, as wandb closes it a moment after `finish`."""
    for _ in range(100):
        records = list(_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} was not closed")


def _records(file):
    """Yield the records of a LevelDB log: blocks of 32 KiB, each record with a header of 7 bytes."""
    data, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        # A complete record, or its last part.
        if kind in (1, 4):
            yield Record.FromString(b"".join(parts))
            parts = []


def wandb_rows(file):
    """Return the logged rows as dictionaries, without wandb's time stamps."""
    rows = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if name not in ("_timestamp", "_runtime")})
    return rows


def wandb_run(file):
    """Return the name and the settings of a wandb run."""
    run = next(record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run")
    return run, {item.key: json.loads(item.value_json) for item in run.config.update}


def tensorboard_points(folder):
    """Return `(curve, step, value)` of all event files of a folder."""
    points = []
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack("<Q", data[place : place + 8])
            event = Event.FromString(data[place + 12 : place + 12 + length])
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
            place += 16 + length
    return points
