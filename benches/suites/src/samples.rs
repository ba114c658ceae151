//! Taking turns.

use anyhow::Result;

/// Measures everybody in turns, `rounds` times, so that a drift of the machine hits all alike. One list per contender.
pub(crate) fn in_turns<C, S>(
    contenders: &mut [C],
    rounds: u32,
    mut measure: impl FnMut(&mut C) -> Result<S>,
) -> Result<Vec<Vec<S>>> {
    let mut samples = contenders.iter().map(|_| Vec::new()).collect::<Vec<_>>();
    for _ in 0..rounds {
        for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
            samples.push(measure(contender)?);
        }
    }
    Ok(samples)
}
