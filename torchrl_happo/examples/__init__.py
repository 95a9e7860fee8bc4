"""Examples that one reads and runs: ``python -m torchrl_happo.examples.NAME [FRAMES]``.

Each is one file of at most 120 lines, and ends in something to look at.

- `torchrl_happo.examples.vmas_team`: a VMAS team from MAPPO to HAPPO, before and after, complete.
- `torchrl_happo.examples.unlike_agents`: a speaker and a listener, each with its own trust region.
- `torchrl_happo.examples.own_environment`: an own environment, in which an agent drops out.
- `torchrl_happo.examples.memory`: agents with a GRU, in a game that asks for memory.
- `torchrl_happo.examples.happo_by_hand`: the sequential update as a loop of one's own.
- `torchrl_happo.examples.trainer`: TorchRL's `Trainer` and its checkpoints.
- `torchrl_happo.examples.two_teams`: two teams that play each other, with unlike algorithms.

# Tuning

Which keys to touch first, in this order; each is an argument of the class that is named, and a key
of the command line.

1. **The learning rate** (`optimizer=partial(torch.optim.Adam, lr=...)`, `algorithm.optimizer.lr`).
   HATRPO has none for its actors: its radius `max_kl` plays this part.
2. **How far a batch is used**: `num_epochs` and `clip_epsilon` of HAPPO, `max_kl` of HATRPO. In a
   team these are spent once by every agent, so that more agents want smaller steps.
3. **The size of a batch**, frames per batch and `minibatch_size`. HATRPO takes one step a batch and
   wants a large one; its divergence is a mean over all of it.
4. **The critic**: `critic_epochs`, `critic_optimizer`, `value_norm=ValueNorm...` where returns are
   large or drift.
5. **The horizon**: `loss.make_value_estimator(gamma=..., lmbda=...)`.

What a symptom means (`torchrl_happo.update.metrics` explains the metrics), and what to touch:

- `factor_ess` of the last agents below 0.5: the agents before have moved too far for this batch.
  Fewer epochs, a smaller `clip_epsilon` or `max_kl`, a larger batch.
- `clip_fraction` above 0.3: many decisions have left the trusted range. A smaller learning rate,
  fewer epochs.
- `clip_fraction` 0 and `kl` below 1e-4: the agents hardly move. A larger rate, more epochs.
- `line_search_success` often 0: the linear model of the surrogate does not hold. A larger batch,
  more `damping`, a smaller `max_kl`.
- `cg_residual` above 0.1: conjugate gradient has not converged. More `cg_iterations` or `damping`.
- `explained_variance` at or below 0: the critic knows nothing of the returns. More `critic_epochs`,
  value normalisation, or a critic that sees more (`make_critic(input=...)`).
- `entropy` falls early: exploration has ended. A larger `entropy_coeff`, a smaller learning rate.
- The return falls after a rise: steps too large for the last agents. `target_kl`, smaller steps, or
  HATRPO.
"""
