//! Taking turns, and what many samples come to.

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

/// What so many of a hundred samples do not exceed; 0 of none.
pub(crate) fn percentile(samples: &[f64], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_upper_end() {
        let samples: Vec<f64> = (1..=50).rev().map(f64::from).collect();
        for (percent, wanted) in [(100, 50.0), (99, 50.0), (98, 49.0), (50, 25.0)] {
            assert!((percentile(&samples, percent) - wanted).abs() < 1e-9, "{percent}");
        }
        assert!(percentile(&[], 99).abs() < 1e-9);
    }
}
