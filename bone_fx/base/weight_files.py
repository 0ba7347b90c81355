"""Finding a checkpoint's weight files in a folder, without trusting any name in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bone_fx.errors import BaseModelError, some
from bone_fx.files.inputs import unsafe_entries
from bone_fx.files.json_file import NotJsonError, read_object
from bone_fx.weights.recipes.recipe import Read
from bone_fx.weights.storage.safetensors_file import read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
_TO_SAFETENSORS = (
    "convert once where you trust the file: "
    "AutoModel.from_pretrained(folder, weights_only=True).save_pretrained(new_folder)"
)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        BaseModelError: The file cannot be read or holds something else.
    """
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise BaseModelError(
            f"{path} cannot be read",
            found=error.strerror,
            next_step="download the complete model",
        ) from error
    except NotJsonError as error:
        raise BaseModelError(
            f"{path} is not JSON, or does not hold a JSON object",
            found=str(error),
            next_step="download it again",
        ) from error


def refuse_unsafe(folder: Path) -> None:
    """Refuse a folder with links that leave it, or with pipes and devices.

    Raises:
        BaseModelError: It has some; the message names them.
    """
    try:
        unsafe = unsafe_entries(folder)
    except OSError as error:
        raise BaseModelError(
            f"{folder} cannot be read",
            found=error.strerror,
            next_step="make it readable",
        ) from error
    if unsafe:
        raise BaseModelError(
            f"{folder} holds links that leave it, or no regular files",
            expected="files, and links within the folder",
            found=some(unsafe),
            next_step="put the files themselves there, or take the links away",
        )


def find_weights(folder: Path, named: object = None) -> tuple[Path, ...]:
    """The safetensors files that hold a folder's weights, in order.

    Args:
        folder: A model folder.
        named: What config.json has as `transformers_weights`, if it has: a file name.

    Raises:
        BaseModelError: There are none, only pickles, or an index that points nowhere or out of the
            folder.
    """
    if named is not None:
        if not isinstance(named, str):
            raise BaseModelError(
                f"transformers_weights in {folder / 'config.json'} is no file name",
                found=repr(named),
                next_step="correct it, or take it out of config.json",
            )
        return _indexed(folder, inside(folder, named, "config.json"))
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return _indexed(folder, folder / INDEX)
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        raise BaseModelError(
            f"{folder} is an adapter, not a base model",
            expected=f"a folder with {SINGLE}",
            next_step=f"bone-export BASE --adapter {folder} -o OUT, with the model that it was "
            "trained on as BASE",
        )
    if loose:
        raise BaseModelError(
            f"{folder} has no {SINGLE} and no {INDEX}",
            found=", ".join(loose[:5]),
            next_step=f"add the index of these files, or rename a single file to {SINGLE}",
        )
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    if pickles:
        raise BaseModelError(
            f"{folder} has its weights only as pickle files, which can run code when they are read",
            expected=SINGLE,
            found=", ".join(pickles[:5]),
            next_step=_TO_SAFETENSORS,
        )
    raise BaseModelError(
        f"{folder} has no weights",
        expected=f"{SINGLE}, {INDEX} or one .gguf file",
        found=", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder",
        next_step="download the complete model",
    )


def inside(folder: Path, name: str, where: str) -> Path:
    """A file in a folder by a name that was read from one of its files.

    Raises:
        BaseModelError: The name leads out of the folder or to no file.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise BaseModelError(
            f"{where} in {folder} points out of its folder",
            expected="a file name",
            found=repr(name),
            next_step="put the weights into the folder, and name them without a path",
        )
    if not (folder / path).is_file():
        raise BaseModelError(
            f"{where} in {folder} names a file that is not there",
            found=name,
            next_step="download the complete model",
        )
    return folder / path


def read_tensors(files: tuple[Path, ...]) -> dict[str, Read]:
    """Every tensor under its name on disk.

    Raises:
        BaseModelError: A file is broken, or two hold a tensor of one name.
    """
    tensors: dict[str, Read] = {}
    for path in files:
        for key, entry in read_header(path).items():
            if key in tensors:
                raise BaseModelError(
                    f"two weight files in {path.parent} hold {key!r}",
                    expected="each tensor in one file",
                    found=f"{tensors[key].path} and {path}",
                    next_step="download it again into an empty folder",
                )
            tensors[key] = Read(path, key, entry)
    return tensors


def check_index(folder: Path, named: object, tensors: Mapping[str, Read]) -> None:
    """That every name in the index, if there is one, has its bytes where the index says.

    Args:
        folder: The model folder.
        named: What config.json has as `transformers_weights`, if it has: a file name.
        tensors: Every tensor under its name on disk.

    Raises:
        BaseModelError: A shard lacks a tensor that the index places there.
    """
    index = folder / (named if isinstance(named, str) else INDEX)
    is_single = named is None and (folder / SINGLE).is_file()
    if is_single or index.suffix != ".json" or not index.is_file():
        return
    weight_map = _weight_map(index)
    lost = [key for key, name in weight_map.items() if not _lies_in(tensors, key, folder / name)]
    if lost:
        raise BaseModelError(
            f"{index} lists {lost[0]!r}, which {weight_map[lost[0]]} does not hold",
            expected=f"{len(weight_map)} tensors where the index says",
            found=f"{len(lost)} that are not there: {some(lost, 3)}",
            next_step="download it again",
        )


def _lies_in(tensors: Mapping[str, Read], key: str, file: Path) -> bool:
    return key in tensors and tensors[key].path == file


def _indexed(folder: Path, path: Path) -> tuple[Path, ...]:
    if not path.name.endswith(".json"):
        return (path,)
    names = sorted(set(_weight_map(path).values()))
    files = tuple(inside(folder, name, path.name) for name in names)
    if any(file.suffix != ".safetensors" for file in files):
        raise BaseModelError(
            f"{path} names files that are not safetensors",
            found=", ".join(names[:5]),
            next_step=_TO_SAFETENSORS,
        )
    return files


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(
            f"{path} has no weight_map",
            expected="an object from tensor name to file name",
            next_step="download it again",
        )
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise BaseModelError(
                f"{path} maps {key!r} to no file name",
                found=repr(name),
                next_step="download it again",
            )
    return weight_map
