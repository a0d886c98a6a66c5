"""The layout of a LeRobotDataset v3 folder, as LeRobot's documentation and code define it.

``meta/info.json`` with the features, ``meta/tasks.parquet``, one row per episode in ``meta/episodes/``, one row per
frame in ``data/``, and the images either inside those rows (PNG or JPEG) or in ``videos/<camera>/``, many episodes per
MP4 file. ``observation.state`` and ``action`` are the vectors.

What LeRobot has no place for travels in ``meta/selfalign.json`` and in the extra columns ``embodiment_index`` and
``stamp_ns``; LeRobot reads such a folder as any other. Play has the empty task. Expert chunks are not exported.
"""

CODEBASE_VERSION = "v3.0"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
OURS = "meta/selfalign.json"
EXTRA = {"embodiment_index": "int64", "stamp_ns": "int64"}
