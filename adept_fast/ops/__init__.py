"""Operations with several backends, and the choice between them."""
