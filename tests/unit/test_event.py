"""The envelope of an event, and its size."""

from datetime import datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from figbridge.event import Event, envelopes

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


TIME = st.datetimes(timezones=st.integers(-12, 12).map(lambda hours: timezone(timedelta(hours=hours))))


@given(TEXT, TEXT, TEXT, TIME | TIME.map(lambda time: time.replace(microsecond=0)), st.binary(max_size=40))
def test_the_size_of_an_envelope_is_its_length(
    identity: str, source: str, detail_type: str, time: datetime, detail: bytes
) -> None:
    if time.year < 1000 or time.year > 9998:  # a commit's never is; in another zone it may have no year at all
        return
    event = Event(identity, source, detail_type, "k", time, detail)

    assert event.body_size() == len(event.envelope())
    assert envelopes([event]) == [event.envelope()]
