"""What a training run will take, before it is started: parameters, FLOPs, memory, days."""

from gptnorm.plan.planner import Plan, make_plan

__all__ = ["Plan", "make_plan"]
