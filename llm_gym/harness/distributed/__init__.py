"""The processes that train together: who they are, whether they live, how a model is split over them."""
