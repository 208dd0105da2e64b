"""Boxes in Pascal VOC's format: an `.xml` file for each image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

from mobilevit.data.boxes import Box, BoxTable, box_splits, size_problem
from mobilevit.data.folders import (
    IMAGE_FOLDERS,
    find_parts,
    has_file,
    read_class_names,
    read_lists,
    relative,
    stem,
    sub_folder,
)
from mobilevit.data.imageset import ImageSet
from mobilevit.errors import MobileViTError
from mobilevit.imaging.decode import find_images
from mobilevit.progress import Progress
from mobilevit.tasks.targets import Boxes

_XML_FOLDERS = ("annotations", "labels")


def find_voc(path: Path) -> list[Path]:
    """Find the folders that hold VOC data: the path itself, else those such as VOCdevkit/VOC2012 below it."""
    if _is_voc(path) or any(_is_voc(part) for part in find_parts(path).values()):
        return [path]
    deeper = [p for base in (path, path / "VOCdevkit") if base.is_dir() for p in sorted(base.glob("VOC20*"))]
    return [p for p in deeper if _is_voc(p)]


def _is_voc(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    beside = any(entry.name.lower().endswith(".xml") for entry in os.scandir(folder))
    return beside or has_file(sub_folder(folder, _XML_FOLDERS), ".xml")


def read_voc(root: Path) -> dict[str, ImageSet[Boxes]]:
    """Read the parts of a folder that `find_voc` found."""
    tables = _tables(root)
    file = root / "classes.txt"
    if file.is_file():
        classes = tuple(read_class_names(file))
    else:
        classes = tuple(sorted({str(box.label) for table in tables.values() for box in table.boxes}))
    return box_splits(tables, classes, {name: index for index, name in enumerate(classes)})


class _Files:
    """Files by name without suffix: relative to their folder, or bare."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.by_name = {stem(relative(file, folder)): file for file in files}
        self._bare = {Path(name).name: name for name in reversed(self.by_name)}

    def find(self, name: str) -> str | None:
        """Return the name as it stands in `by_name`, if there is such a file."""
        return name if name in self.by_name else self._bare.get(Path(name).name)


def _tables(root: Path) -> dict[str, BoxTable]:
    if not _is_voc(root):  # but its parts are
        parts = {part: folder for part, folder in find_parts(root).items() if _is_voc(folder)}
        return {part: _table(root, folder, *_files(folder)) for part, folder in parts.items()}
    xmls, images = _files(root)
    lists = read_lists(root / "ImageSets/Main")
    tables = {part: _table(root, file, xmls, images, names) for part, (file, names) in lists.items()}
    return tables or {"all": _table(root, root, xmls, images)}


def _files(folder: Path) -> tuple[_Files, _Files]:
    """List annotations and images."""
    annotations = sub_folder(folder, _XML_FOLDERS)
    if annotations is None or not has_file(annotations, ".xml"):
        annotations = folder
    images = sub_folder(folder, IMAGE_FOLDERS) or folder
    xmls = (Path(p, name) for p, _, names in os.walk(annotations) for name in names if name.lower().endswith(".xml"))
    return _Files(annotations, sorted(xmls)), _Files(images, find_images(images))


def _table(root: Path, origin: Path, xmls: _Files, images: _Files, listed: list[str] | None = None) -> BoxTable:
    """Read the images of a list, or without one every annotation, then the images that have none."""
    table = BoxTable(root=root, origin=str(origin), word="object", known="classes.txt")
    used: set[str | None] = set()
    names = sorted(xmls.by_name) if listed is None else [stem(name) for name in listed]
    with Progress("read annotations", len(names)) as progress:
        for name in names:
            progress.advance(1)
            first = stem(name.partition(" ")[0]) if listed else name  # lists of a single class have a second column
            xml, image = xmls.find(name) or xmls.find(first), images.find(name) or images.find(first)
            if xml is not None:
                used.add(_add_xml(table, xmls.by_name[xml], images, image))
            elif image is not None:
                _add_unlabeled(table, images.by_name[image])
            else:
                table.report(origin, "listed image that is missing", name, "left out")
    for name in sorted(set(images.by_name) - used) if listed is None else ():
        _add_unlabeled(table, images.by_name[name])
    return table


def _add_unlabeled(table: BoxTable, image: Path) -> None:
    if size := table.open_image(image):
        table.report(image, "image without an annotation file", remedy="taken as one without objects")
        table.add_image(image, image, size)


def _add_xml(table: BoxTable, xml: Path, images: _Files, name: str | None) -> str | None:
    """Read one file and return the name of its image: the one of the same name, else the one that the file states."""
    try:
        tree = _parse(xml)
    except ValueError as error:
        table.report(xml, "malformed annotation", str(error), "its image is left out; write the file again")
        return name
    stated = (tree.findtext("filename") or "").strip()
    name = name or images.find(stem(stated.replace("\\", "/")))
    if name is None:
        table.report(xml, "annotation for a missing image", stated, "left out")
    elif size := table.open_image(images.by_name[name]):
        with suppress(ValueError, OverflowError):  # the image's own size counts
            width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
            if width and height and (width, height) != size:
                table.problems.append(size_problem(str(xml), (width, height), size))
        _add_objects(table, table.add_image(images.by_name[name], xml, size), xml, tree)
    return name


def _add_objects(table: BoxTable, owner: int, xml: Path, tree: ElementTree.Element) -> None:
    for mark, item in enumerate(tree.iterfind("object"), start=1):
        try:
            left, top, right, bottom = (
                float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            table.report(f"{xml}, object {mark}", "malformed box", remedy="left out; it needs xmin, ymin, xmax, ymax")
            continue
        label = (item.findtext("name") or "").strip()
        if not label:
            table.report(f"{xml}, object {mark}", "object without a name", remedy="left out; name it")
            continue
        difficult = (item.findtext("difficult") or "").strip() == "1"
        table.boxes.append(Box(owner, mark, label, (left, top, right, bottom), difficult))


def _parse(file: Path) -> ElementTree.Element:
    data = file.read_bytes()
    # Entities can be made to expand without end; no annotation needs any.
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise MobileViTError("declares a DOCTYPE or entities, which is not safe to read")
    if b"\0" in data:
        raise MobileViTError("not in UTF-8")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise MobileViTError(str(error)) from None
