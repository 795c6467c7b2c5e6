"""A folder that `datasets` wrote with `save_to_disk`: a Dataset (state.json), or a DatasetDict of splits (dataset_dict.json)."""

from __future__ import annotations

from ambient_sd.data.layouts.hub import dataset_table
from ambient_sd.data.layouts.layout import Layout, Request, Table
from ambient_sd.utils.errors import UserError

_DATASET, _DICT = "state.json", "dataset_dict.json"


class Arrow(Layout):
    """Read what `save_to_disk` wrote.

    Example:
        >>> import datasets, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> datasets.disable_progress_bars()
        >>> datasets.Dataset.from_dict({"image": [b"PNG"], "text": ["a cat"]}).save_to_disk(folder)
        >>> Arrow().detects(Request(folder))
        True
    """

    name, what = "arrow", "a dataset that save_to_disk wrote"

    def detects(self, request: Request) -> bool:
        folder = request.path
        return request.is_folder and (
            (folder / _DICT).is_file() or ((folder / _DATASET).is_file() and any(folder.glob("*.arrow")))
        )

    def read(self, request: Request) -> Table:
        import datasets

        try:
            data = datasets.load_from_disk(str(request.path))
        except Exception as error:  # a damaged file raises half a dozen kinds
            raise UserError(f"{request.source} cannot be read as what save_to_disk writes",
                            rule=f"{type(error).__name__}: {error}", remedy="save it again")  from None  # fmt: skip
        if isinstance(data, datasets.DatasetDict):
            split = request.split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
            if split not in data:
                raise UserError(f"{request.source} has no split {split!r}", rule=f"its splits are {', '.join(map(str, data))}",
                                remedy="name one with --dataset_split")  # fmt: skip
            return dataset_table(request, data[split], local=True)
        if request.split is not None and "split" in data.column_names:
            data = data.filter(lambda value: value == request.split, input_columns="split", keep_in_memory=True)
        return dataset_table(request, data, local=True)
