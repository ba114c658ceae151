//! Taking turns.

use anyhow::Result;

/// Measures everybody in turns, `rounds` times, so that a drift of the machine hits all alike. One list per contender.
pub(crate) fn in_turns<C>(
    contenders: &mut [C],
    rounds: u32,
    mut measure: impl FnMut(&mut C) -> Result<f64>,
) -> Result<Vec<Vec<f64>>> {
    let mut samples = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
            samples.push(measure(contender)?);
        }
    }
    Ok(samples)
}
