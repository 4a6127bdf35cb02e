"""Shape annotations. jaxtyping checks them while tests run; without it they are plain `Tensor`.

jaxtyping is a tool of development: at run time the model needs torch and transformers alone.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:

        class _Unchecked:
            def __class_getitem__(cls, item: Any) -> type[Tensor]:
                return Tensor

        Bool = Float = Int = _Unchecked

__all__ = ["Bool", "Float", "Int"]
