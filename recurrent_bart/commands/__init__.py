"""Commands: the functions behind `recurrent-bart NAME` and `launch/NAME.py`; see launch/README.md."""
