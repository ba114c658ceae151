//! Names for apps whose makers have none.

use rand::seq::IndexedRandom as _;

const FIRST: [&str; 24] = [
    "amber", "brisk", "calm", "clear", "copper", "dawn", "eager", "fair", "gentle", "golden", "keen",
    "lively", "lunar", "mellow", "nimble", "noble", "proud", "quiet", "rapid", "silver", "solar", "steady",
    "swift", "vivid",
];
const SECOND: [&str; 24] = [
    "badger", "bison", "condor", "crane", "dolphin", "falcon", "ferret", "finch", "gecko", "heron", "ibex",
    "lynx", "marten", "osprey", "otter", "panther", "puffin", "raven", "salmon", "seal", "stork", "swan",
    "tern", "wren",
];

/// Two words and four digits.
pub(super) fn random() -> String {
    let mut rng = rand::rng();
    let mut word = |words: &[&'static str]| words.choose(&mut rng).copied().unwrap_or("app");
    let (first, second) = (word(&FIRST), word(&SECOND));
    format!("{first}-{second}-{:04}", rand::random_range(0..10_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_of_apps() {
        let name = random();
        assert!(
            name.len() <= 40
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        );
    }
}
