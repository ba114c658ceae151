//! Byte ranges of `Range` headers (RFC 9110, §14).

use std::ops::Range;

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Everything: no range, or one in a form that a server may ignore (other units, several ranges).
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Bytes that are not there.
    Unsatisfiable,
}

/// Reads a `Range` header against an object of `length` bytes.
pub(crate) fn wanted(header: Option<&str>, length: u64) -> Wanted {
    let Some((first, last)) = header
        .and_then(|header| header.trim().strip_prefix("bytes="))
        .filter(|ranges| !ranges.contains(','))
        .and_then(|range| range.split_once('-'))
    else {
        return Wanted::Whole;
    };
    let (first, last) = (first.trim(), last.trim());
    let number = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| text.parse::<u64>().ok())
            .flatten()
    };
    let range = match (first.is_empty(), last.is_empty()) {
        (true, true) => return Wanted::Whole,
        (true, false) => number(last).map(|count| length.saturating_sub(count)..length),
        (false, true) => number(first).map(|first| first..length),
        (false, false) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Some(first..length.min(last.saturating_add(1))),
            _ => None,
        },
    };
    match range {
        None => Wanted::Whole,
        Some(range) if range.start >= range.end => Wanted::Unsatisfiable,
        Some(range) => Wanted::Part(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_forms_of_the_standard() {
        assert_eq!(wanted(Some("bytes=0-4"), 10), Wanted::Part(0..5));
        assert_eq!(wanted(Some("bytes=5-"), 10), Wanted::Part(5..10));
        assert_eq!(wanted(Some("bytes=-3"), 10), Wanted::Part(7..10));
        assert_eq!(wanted(Some("bytes=-30"), 10), Wanted::Part(0..10));
        assert_eq!(wanted(Some("bytes=8-100"), 10), Wanted::Part(8..10));
        assert_eq!(wanted(Some("bytes=10-"), 10), Wanted::Unsatisfiable);
        assert_eq!(wanted(Some("bytes=-0"), 10), Wanted::Unsatisfiable);
        assert_eq!(wanted(Some("bytes=0-1,3-4"), 10), Wanted::Whole);
        assert_eq!(wanted(Some("bytes=4-2"), 10), Wanted::Whole);
        assert_eq!(wanted(None, 10), Wanted::Whole);
    }

    proptest! {
        #[test]
        fn parts_lie_within(header in "(bytes=)?[0-9]{0,20}-[0-9]{0,20}|\\PC{0,20}", length: u64) {
            if let Wanted::Part(range) = wanted(Some(&header), length) {
                prop_assert!(range.start < range.end && range.end <= length);
            }
        }
    }
}
