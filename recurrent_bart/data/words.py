"""Words and sentences of texts in any script."""

import re

# scripts written without spaces: kana, Chinese characters, Thai
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
# in unspaced scripts each character is one
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
