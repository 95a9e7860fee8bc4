"""The cooperative scenarios of VMAS, one typed dataclass each.

The fields are the arguments of the scenario, as VMAS names them; their values, VMAS's own
defaults, are in ``conf/task/vmas``.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from torchrl_happo.recipe.config import VmasTask, count


@dataclass
class Balance(VmasTask):
    """The team carries a ball on a platform to a goal against gravity."""

    n_agents: int = count()
    package_mass: float = MISSING
    random_package_pos_on_line: bool = MISSING


@dataclass
class BallPassage(VmasTask):
    """Two agents push a ball through a gap in a wall."""

    n_passages: int = count()
    fixed_passage: bool = MISSING
    random_start_angle: bool = MISSING


@dataclass
class BallTrajectory(VmasTask):
    """Two linked agents move a ball along a circle."""

    pos_shaping_factor: float = MISSING
    speed_shaping_factor: float = MISSING
    dist_shaping_factor: float = MISSING
    joints: bool = MISSING


@dataclass
class BuzzWire(VmasTask):
    """Two agents carry a ring along a wire without touching it."""

    random_start_angle: bool = MISSING
    pos_shaping_factor: float = MISSING
    collision_reward: float = MISSING
    max_speed_1: float | None = MISSING


@dataclass
class Discovery(VmasTask):
    """Agents gather in numbers at targets."""

    n_agents: int = count()
    n_targets: int = count()
    x_semidim: float = MISSING
    y_semidim: float = MISSING
    min_dist_between_entities: float = MISSING
    lidar_range: float = MISSING
    covering_range: float = MISSING
    use_agent_lidar: bool = MISSING
    n_lidar_rays_entities: int = MISSING
    n_lidar_rays_agents: int = MISSING
    agents_per_target: int = MISSING
    targets_respawn: bool = MISSING
    shared_reward: bool = MISSING
    agent_collision_penalty: float = MISSING
    covering_rew_coeff: float = MISSING
    time_penalty: float = MISSING


@dataclass
class Dispersion(VmasTask):
    """Agents that start at one point share out the food around them."""

    n_agents: int = count()
    share_reward: bool = MISSING
    penalise_by_time: bool = MISSING
    food_radius: float = MISSING
    pos_range: float = MISSING
    n_food: int = count()


@dataclass
class Dropout(VmasTask):
    """One agent must reach the goal, and energy costs the team."""

    n_agents: int = count()
    energy_coeff: float = MISSING
    start_same_point: bool = MISSING


@dataclass
class Flocking(VmasTask):
    """Agents flock around a target between obstacles."""

    n_agents: int = count()
    n_obstacles: int = MISSING
    min_dist_between_entities: float = MISSING
    n_lidar_rays: int = MISSING
    collision_reward: float = MISSING
    dist_shaping_factor: float = MISSING


@dataclass
class Football(VmasTask):
    """The blue team learns to beat the scripted red one."""

    n_blue_agents: int = count()
    n_red_agents: int = MISSING
    ai_strength: float = MISSING
    ai_decision_strength: float = MISSING
    ai_precision_strength: float = MISSING
    disable_ai_red: bool = MISSING
    spawn_in_formation: bool = MISSING
    pitch_length: float = MISSING
    pitch_width: float = MISSING
    enable_shooting: bool = MISSING
    max_speed: float = MISSING
    ball_max_speed: float = MISSING
    dense_reward: bool = MISSING
    pos_shaping_factor_ball_goal: float = MISSING
    pos_shaping_factor_agent_ball: float = MISSING
    distance_to_ball_trigger: float = MISSING
    scoring_reward: float = MISSING
    observe_teammates: bool = MISSING
    observe_adversaries: bool = MISSING


@dataclass
class GiveWay(VmasTask):
    """Two agents swap sides through a corridor that holds one."""

    v_range: float = MISSING
    a_range: float = MISSING
    obs_noise: float = MISSING
    box_agents: bool = MISSING
    linear_friction: float = MISSING
    mirror_passage: bool = MISSING
    done_on_completion: bool = MISSING
    observe_rel_pos: bool = MISSING
    pos_shaping_factor: float = MISSING
    final_reward: float = MISSING
    energy_rew_coeff: float = MISSING
    agent_collision_penalty: float = MISSING
    passage_collision_penalty: float = MISSING
    obstacle_collision_penalty: float = MISSING
    use_velocity_controller: bool = MISSING
    min_input_norm: float = MISSING
    dt_delay: int = MISSING


@dataclass
class JointPassage(VmasTask):
    """Two linked agents turn to fit through a gap."""

    n_passages: int = count()
    fixed_passage: bool = MISSING
    joint_length: float = MISSING
    random_start_angle: bool = MISSING
    random_goal_angle: bool = MISSING
    observe_joint_angle: bool = MISSING
    joint_angle_obs_noise: float = MISSING
    asym_package: bool = MISSING
    mass_ratio: float = MISSING
    mass_position: float = MISSING
    max_speed_1: float | None = MISSING
    pos_shaping_factor: float = MISSING
    rot_shaping_factor: float = MISSING
    collision_reward: float = MISSING
    energy_reward_coeff: float = MISSING
    all_passed_rot: bool = MISSING
    obs_noise: float = MISSING
    use_controller: bool = MISSING


@dataclass
class JointPassageSize(VmasTask):
    """Two linked agents of different sizes pass gaps of different widths."""

    fixed_passage: bool = MISSING
    joint_length: float = MISSING
    random_start_angle: bool = MISSING
    random_goal_angle: bool = MISSING
    observe_joint_angle: bool = MISSING
    joint_angle_obs_noise: float = MISSING
    asym_package: bool = MISSING
    mass_ratio: float = MISSING
    mass_position: float = MISSING
    max_speed_1: float | None = MISSING
    pos_shaping_factor: float = MISSING
    rot_shaping_factor: float = MISSING
    collision_reward: float = MISSING
    energy_reward_coeff: float = MISSING
    obs_noise: float = MISSING
    n_passages: int = count()
    middle_angle_180: bool = MISSING
    use_vel_controller: bool = MISSING


@dataclass
class MultiGiveWay(VmasTask):
    """Four agents cross at a junction that holds one."""

    u_range: float = MISSING
    a_range: float = MISSING
    obs_noise: float = MISSING
    box_agents: bool = MISSING
    linear_friction: float = MISSING
    min_input_norm: float = MISSING
    comms_range: float = MISSING
    shared_rew: bool = MISSING
    pos_shaping_factor: float = MISSING
    final_reward: float = MISSING
    agent_collision_penalty: float = MISSING


@dataclass
class Navigation(VmasTask):
    """Each agent goes to its goal without hitting the others."""

    n_agents: int = count()
    collisions: bool = MISSING
    world_spawning_x: float = MISSING
    world_spawning_y: float = MISSING
    enforce_bounds: bool = MISSING
    agents_with_same_goal: int = MISSING
    split_goals: bool = MISSING
    observe_all_goals: bool = MISSING
    lidar_range: float = MISSING
    agent_radius: float = MISSING
    comms_range: float = MISSING
    n_lidar_rays: int = MISSING
    shared_rew: bool = MISSING
    pos_shaping_factor: float = MISSING
    final_reward: float = MISSING
    agent_collision_penalty: float = MISSING


@dataclass
class Passage(VmasTask):
    """Five agents pass gaps in a wall, in formation."""

    n_passages: int = count()
    shared_reward: bool = MISSING


@dataclass
class ReverseTransport(VmasTask):
    """Agents inside a package push it to a goal."""

    n_agents: int = count()
    package_width: float = MISSING
    package_length: float = MISSING
    package_mass: float = MISSING


@dataclass
class RoadTraffic(VmasTask):
    """Cars share a road network without collisions."""

    n_agents: int = count()
    map_type: str = MISSING
    is_partial_observation: bool = MISSING
    n_nearing_agents_observed: int = MISSING
    n_points_short_term: int = MISSING
    n_observed_steps: int = MISSING
    n_points_nearing_boundary: int = MISSING
    is_ego_view: bool = MISSING
    is_apply_mask: bool = MISSING
    is_observe_vertices: bool = MISSING
    is_observe_distance_to_agents: bool = MISSING
    is_observe_distance_to_boundaries: bool = MISSING
    is_observe_distance_to_center_line: bool = MISSING
    is_observe_ref_path_other_agents: bool = MISSING
    is_add_noise: bool = MISSING
    dt: float = MISSING
    max_speed: float = MISSING
    reward_progress: float = MISSING
    reward_vel: float = MISSING
    reward_reach_goal: float = MISSING


@dataclass
class Sampling(VmasTask):
    """Agents spread over a field to sample a density."""

    n_agents: int = count()
    shared_rew: bool = MISSING
    comms_range: float = MISSING
    lidar_range: float = MISSING
    agent_radius: float = MISSING
    xdim: float = MISSING
    ydim: float = MISSING
    grid_spacing: float = MISSING
    n_gaussians: int = count()
    cov: float = MISSING
    collisions: bool = MISSING
    spawn_same_pos: bool = MISSING
    norm: bool = MISSING


@dataclass
class Transport(VmasTask):
    """Agents push packages that one alone cannot move."""

    n_agents: int = count()
    n_packages: int = count()
    package_width: float = MISSING
    package_length: float = MISSING
    package_mass: float = MISSING


@dataclass
class Wheel(VmasTask):
    """Agents turn a line around its middle at a set speed."""

    n_agents: int = count()
    line_length: float = MISSING
    line_mass: float = MISSING
    desired_velocity: float = MISSING


@dataclass
class WindFlocking(VmasTask):
    """Two agents of different size line up against the wind."""

    vel_shaping_factor: float = MISSING
    dist_shaping_factor: float = MISSING
    wind_shaping_factor: float = MISSING
    pos_shaping_factor: float = MISSING
    rot_shaping_factor: float = MISSING
    energy_shaping_factor: float = MISSING
    observe_rel_pos: bool = MISSING
    observe_rel_vel: bool = MISSING
    observe_pos: bool = MISSING
    use_controller: bool = MISSING
    wind: float = MISSING
    v_range: float = MISSING
    desired_vel: float = MISSING
    f_range: float = MISSING
    cover_angle_tolerance: float = MISSING
    horizon: int = MISSING
