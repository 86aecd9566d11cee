"""Operations with several implementations, and which one runs."""
