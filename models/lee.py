"""The Lee documents with human ratings of how alike they are: 50 news texts, each of the 1,225 pairs rated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from planish.errors import NumericError
from planish.models.registry import MODELS, package_file
from planish.models.text import Documents


@dataclass(frozen=True)
class Rated:
    """Documents and the mean human rating of each pair.

    Attributes:
        documents: n texts.
        human: ratings in 0 to 1, [n, n] in fp64; only the part above the diagonal is filled.
    """

    documents: Documents
    human: torch.Tensor


def rated(tokenizer: Any) -> Rated:
    """The 50 documents, and the ratings of Lee, Pincombe and Welsh (2005), as gensim ships them.

    Raises:
        MissingPackageError: gensim's files are not there.
    """
    row = MODELS["minilm"]
    folder = package_file(row, "gensim", "test", "test_data", "lee.cor").parent
    lines = package_file(row, "gensim", "test", "test_data", "similarities0-1.txt").read_text().splitlines()
    human = torch.tensor([[float(value) for value in line.split()] for line in lines], dtype=torch.float64)
    return Rated(Documents(tuple((folder / "lee.cor").read_text("latin-1").splitlines()), tokenizer), human)


def pearson(vectors: torch.Tensor, human: torch.Tensor) -> float:
    """Correlation of the embeddings' cosines with the ratings, over all pairs of different documents.

    Args:
        vectors: embeddings of length 1, [n, width].
        human: ratings [n, n]; read above the diagonal.

    Raises:
        NumericError: the correlation is not a number: a vector is not finite, or one side is constant.
    """
    upper = torch.triu_indices(len(human), len(human), 1)
    wide = vectors.double()
    pairs = torch.stack([(wide @ wide.T)[*upper], human.double()[*upper]])
    found = float(torch.corrcoef(pairs)[0, 1])
    if found != found:
        raise NumericError("the correlation with the ratings is not a number", why="a side is constant or not finite")
    return found
