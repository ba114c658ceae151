//! What a measurement comes to.

use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;

/// What is wanted of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// Ours is at most this.
    AtMost(f64),
    /// Ours is at least this.
    AtLeast(f64),
    /// Ours is at most the peer's times this.
    RatioAtMost(f64),
    /// Ours is at least the peer's times this.
    RatioAtLeast(f64),
    /// Ours is the peer's, give or take this share of it.
    RatioWithin(f64),
}

impl Goal {
    fn text(self) -> String {
        match self {
            Self::AtMost(most) => format!("ours <= {most}"),
            Self::AtLeast(least) => format!("ours >= {least}"),
            Self::RatioAtMost(most) => format!("ratio <= {most}"),
            Self::RatioAtLeast(least) => format!("ratio >= {least}"),
            Self::RatioWithin(share) => format!("ratio within {share} of 1"),
        }
    }

    fn met(self, ours: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::AtMost(most) => Some(ours <= most),
            Self::AtLeast(least) => Some(ours >= least),
            Self::RatioAtMost(most) => Some(ratio? <= most),
            Self::RatioAtLeast(least) => Some(ratio? >= least),
            Self::RatioWithin(share) => Some((ratio? - 1.0).abs() <= share),
        }
    }
}

/// What is measured, and against whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    pub(crate) suite: &'static str,
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) peer: Option<&'static str>,
    pub(crate) goal: Goal,
}

/// One row. `ratio` is ours by the peer's; `met` is null, with a reason, when the row could not be taken.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    suite: &'static str,
    name: &'static str,
    unit: &'static str,
    ours: Option<f64>,
    peer: Option<f64>,
    peer_name: Option<&'static str>,
    ratio: Option<f64>,
    goal: String,
    met: Option<bool>,
    samples: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Subject {
    /// The row of these samples; without any of ours, or of a peer that there should be, it says so.
    pub(crate) fn row(self, ours: &[f64], peer: &[f64]) -> Row {
        let (our_median, peer_median) = (median(ours), median(peer));
        let ratio = our_median
            .zip(peer_median)
            .filter(|(_, peer)| *peer > 0.0)
            .map(|(ours, peer)| ours / peer);
        let met = our_median.and_then(|ours| self.goal.met(ours, ratio));
        Row {
            suite: self.suite,
            name: self.name,
            unit: self.unit,
            ours: our_median.map(rounded),
            peer: peer_median.map(rounded),
            peer_name: self.peer,
            ratio: ratio.map(rounded),
            goal: self.goal.text(),
            met,
            samples: ours.len(),
            reason: met
                .is_none()
                .then(|| "nothing was measured to compare".to_owned()),
        }
    }

    /// The row of one figure that so many samples come to.
    pub(crate) fn figure(self, ours: f64, samples: usize) -> Row {
        Row {
            samples,
            ..self.row(&[ours], &[])
        }
    }

    /// The row of two figures that so many samples come to.
    pub(crate) fn beside(self, ours: f64, peer: f64, samples: usize) -> Row {
        Row {
            samples,
            ..self.row(&[ours], &[peer])
        }
    }

    /// The row that could not be taken.
    pub(crate) fn missing(self, why: impl std::fmt::Display) -> Row {
        Row {
            reason: Some(why.to_string()),
            met: None,
            ..self.row(&[], &[])
        }
    }

    /// The row of these samples, or why there are none.
    pub(crate) fn taken(self, samples: anyhow::Result<(Vec<f64>, Vec<f64>)>) -> Row {
        match samples {
            Ok((ours, peer)) => self.row(&ours, &peer),
            Err(error) => self.missing(format!("{error:#}")),
        }
    }
}

/// The middle of the samples; none of none.
pub(crate) fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// Four significant digits: more would pretend.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

/// For people.
pub(crate) fn table(rows: &[Row]) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "what", "unit", "ours", "peer", "peer's", "ratio", "goal", "met", "samples",
    ]);
    for row in rows {
        let met = match (row.met, &row.reason) {
            (Some(true), _) => "yes".to_owned(),
            (Some(false), _) => "no".to_owned(),
            (None, reason) => format!("not taken: {}", reason.as_deref().unwrap_or("-")),
        };
        table.add_row([
            row.name.to_owned(),
            row.unit.to_owned(),
            number(row.ours),
            row.peer_name.unwrap_or("-").to_owned(),
            number(row.peer),
            number(row.ratio),
            row.goal.clone(),
            met,
            row.samples.to_string(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECT: Subject = Subject {
        suite: "s",
        name: "n",
        unit: "ms",
        peer: Some("runc"),
        goal: Goal::RatioAtMost(1.0),
    };

    #[test]
    fn medians_are_compared() {
        let row = SUBJECT.row(&[9.0, 1.0, 2.0], &[4.0, 8.0]);
        assert_eq!(
            (row.ours, row.peer, row.ratio),
            (Some(2.0), Some(6.0), Some(0.3333))
        );
        assert_eq!((row.met, row.samples, row.reason), (Some(true), 3, None));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_row_that_cannot_be_taken_says_why() {
        let row = SUBJECT.missing("no runc");
        assert_eq!(
            (row.met, row.ours, row.reason.as_deref()),
            (None, None, Some("no runc"))
        );
        let json = serde_json::to_value(SUBJECT.row(&[1.0], &[])).unwrap();
        assert!(json["met"].is_null() && json["reason"].is_string() && json["goal"] == "ratio <= 1");
        let mut keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        keys.retain(|key| *key != "reason");
        keys.sort_unstable();
        let expected = "goal met name ours peer peer_name ratio samples suite unit";
        assert_eq!(keys.join(" "), expected);
    }

    #[test]
    fn a_ratio_may_have_to_be_close_to_one() {
        let within = Subject {
            goal: Goal::RatioWithin(0.1),
            ..SUBJECT
        };
        for (ours, met) in [(8.9, false), (9.1, true), (10.9, true), (11.1, false)] {
            assert_eq!(within.row(&[ours], &[10.0]).met, Some(met), "{ours}");
        }
    }

    #[test]
    fn a_goal_of_its_own_needs_no_peer() {
        let alone = Subject {
            peer: None,
            goal: Goal::AtMost(15.0),
            ..SUBJECT
        };
        assert_eq!(alone.row(&[14.2], &[]).met, Some(true));
        assert_eq!(alone.row(&[15.1], &[]).met, Some(false));
        assert!((rounded(53_912.7) - 53_910.0).abs() < 1e-6);
    }
}
