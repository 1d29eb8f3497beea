"""Content of the service's answers, and of the notes in a session's file. OpenAPI shows the answers."""

from dataclasses import asdict
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from recurrent_bart.inference.reading_session import Summary


class PassageAnswer(BaseModel):
    """Passage of the text that was read."""

    start: NonNegativeInt = Field(description="index of the first character in the text as it was read")
    end: NonNegativeInt = Field(description="index behind the last character")
    weight: float = Field(description="share of the sentence's attention on passages, 0 to 1")


class CitationAnswer(BaseModel):
    """Passages that one sentence of a summary was read from."""

    start: NonNegativeInt = Field(description="index of the sentence's first character in the summary")
    end: NonNegativeInt = Field(description="index behind the sentence's last character")
    passages: list[PassageAnswer] = Field(description="passages by falling weight, without small ones")
    state_share: float = Field(description="share of all attention that is on the state, 0 to 1")


class SummaryAnswer(BaseModel):
    """Summary of a text, and the part of the text that it was made from."""

    summary: str
    n_segments: NonNegativeInt = Field(description="segments that the encoder read")
    n_tokens: NonNegativeInt = Field(description="tokens that the encoder read, without special tokens")
    n_cut_tokens: NonNegativeInt = Field(description="tokens of the text's end that were not read")
    citations: list[CitationAnswer] | None = Field(default=None, description="passages of each sentence, if asked for")

    @classmethod
    def of(cls, summary: Summary, **more: int) -> Self:
        """Return the answer for a summary."""
        content: dict[str, Any] = asdict(summary) | more
        return cls(summary=content.pop("text"), **content)


class Section(SummaryAnswer):
    """Summary of a section of a session's text."""

    number: int = Field(ge=1, description="number of the section, from 1")


class SessionAnswer(BaseModel):
    """Session and the size of its text."""

    id: str
    n_characters: NonNegativeInt = Field(description="characters of the text so far: the `position` of the next piece")
    n_read: NonNegativeInt = Field(
        description="characters of the text as it was read, without a byte order mark and carriage returns; citations "
        "count these characters"
    )
    n_sections: NonNegativeInt = Field(description="sections that have ended")


class SectionsAnswer(BaseModel):
    """Sections of a session that have ended. The session keeps the last summaries."""

    id: str
    n_sections: NonNegativeInt = Field(description="sections that have ended")
    sections: list[Section] = Field(description="last sections with their summaries, oldest first")


class ErrorAnswer(BaseModel):
    """Error, for a person to read."""

    detail: str


class Notes(BaseModel):
    """Notes of the service in a session's file.

    Attributes:
        n_characters: Characters that clients sent, a carriage return before a line feed included.
        ends_with_return: The last piece of text ended with a carriage return.
        sections: Last sections with their summaries.
    """

    model_config = ConfigDict(strict=True)

    n_characters: NonNegativeInt = 0
    ends_with_return: bool = False
    n_sections: NonNegativeInt = 0
    sections: list[Section] = []
