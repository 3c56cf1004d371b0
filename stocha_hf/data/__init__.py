"""Text to train and measure on: the rows of data sets, and windows of their tokens."""

from stocha_hf.data.rows import check_text, load_data, load_mixture, load_rows
from stocha_hf.data.windows import calibration_texts, calibration_windows, load_tokenizer, text_windows

__all__ = [
    "calibration_texts",
    "calibration_windows",
    "check_text",
    "load_data",
    "load_mixture",
    "load_rows",
    "load_tokenizer",
    "text_windows",
]
