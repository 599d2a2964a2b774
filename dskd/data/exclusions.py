"""Good images that a person has judged and leaves out, such as a mislabelled one, named in a text file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dskd.data.datasets import Category
from dskd.data.samples import Sample


def read_exclusions(file: Path) -> tuple[str, ...]:
    """The names in the file, one per line; empty lines and what follows a # at the start of a line are passed over.

    Raises ValueError if it cannot be read.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--exclude {file} cannot be read as text ({error}); it takes an image's name per line."
        ) from None
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def without_excluded(category: Category, names: Sequence[str]) -> Category:
    """The category without the good images that are named, by file name or by the end of their path.

    Raises ValueError if fewer than two training images are left.
    """
    if not names:
        return category
    train = tuple(sample for sample in category.train if not _is_named(sample, names))
    validation = tuple(each for each in category.validation if each.is_defective or not _is_named(each, names))
    if len(train) < 2 < len(category.train) + 1:
        raise ValueError(
            f"--exclude leaves {len(train)} training images of {category.name}; training needs at least 2."
        )
    return category._replace(train=train, validation=validation)


def check_exclusions(names: Sequence[str], categories: Iterable[Category]) -> None:
    """Raise ValueError with the first name that belongs to no good image of these categories."""
    samples = [each for category in categories for each in (*category.train, *category.validation)]
    good = [sample for sample in samples if not sample.is_defective]
    for name in names:
        if not any(_is_named(sample, [name]) for sample in good):
            raise ValueError(
                f"--exclude names {name!r}, which is no good training or validation image; write a file name, or the "
                "end of a path such as flange/train/good/007.png."
            )


def _is_named(sample: Sample, names: Sequence[str]) -> bool:
    path = f"/{sample.path.as_posix().lstrip('/')}"
    return any(path.endswith(f"/{name.lstrip('./')}") for name in names)
