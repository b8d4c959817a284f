"""Alphabet, complement and vocabularies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnissm.genomics.sequence import (
    IUPAC,
    VOCABULARIES,
    complement,
    decode,
    encode,
    gc_content,
    is_acgt,
    n_runs,
    normalise,
    reverse_complement,
    soft_mask,
    upper,
    vocabulary,
)


@given(st.text(alphabet=IUPAC.decode() + IUPAC.decode().lower()))
def test_complement_is_an_involution(text):
    assert reverse_complement(reverse_complement(text)).decode() == text
    assert complement(complement(text)).decode() == text
    assert reverse_complement(text) == complement(text)[::-1]


def test_complement_of_each_letter():
    assert complement("ACGTRYSWKMBDHVNacgtn") == b"TGCAYRSWMKVHDBNtgcan"
    assert complement("Uu") == b"Aa"


def test_normalise():
    assert normalise("acguN") == b"ACGTN"
    assert normalise("acgu", u_to_t=False) == b"ACGU"
    with pytest.raises(ValueError, match=r"got 'X' at base 4"):
        normalise("ACGXA")


def test_small_facts():
    assert upper(b"acguRyn") == b"ACGTRYN"
    assert soft_mask("ACgtN").tolist() == [False, False, True, True, False]
    assert gc_content("GGCAN") == 0.75
    assert np.isnan(gc_content("NN"))
    assert n_runs("NNACGNTRR").tolist() == [[0, 2], [5, 6], [7, 9]]
    assert is_acgt("ACgtNR").tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(name):
    words = vocabulary(name)
    assert decode(encode("ACGTNacgtu", name), name) == "ACGTNACGTT"
    assert words.bases.tolist() == encode("ACGT", name).tolist()
    assert sorted(words.complement) == list(range(words.size))
    for base, partner in zip("ACGTN", "TGCAN"):
        assert words.complement[encode(base, name)[0]] == encode(partner, name)[0]
    special = {words.pad, words.bos, words.mask}
    assert len(special) == 3
    assert not special & set(encode(IUPAC, name).tolist())
    assert words.is_base.sum() == 4
    text = "ACGTTGCA"
    flipped = words.complement[encode(text, name).astype(int)][::-1]
    assert decode(flipped, name).encode() == reverse_complement(text)


def test_published_ids():
    assert encode("ACGTN", "char").tolist() == [7, 8, 9, 10, 11]  # as Caduceus and HyenaDNA number them
    assert encode("ACGTN", "acgt").tolist() == [4, 5, 6, 7, 3]
    assert encode("ACR", "byte").tolist() == list(b"ACR")
    assert (vocabulary("byte").bos, vocabulary("byte").eos) == (254, 255)


def test_unknown_vocabulary():
    with pytest.raises(ValueError, match="Did you mean 'byte'"):
        encode("A", "bytes")
