//! Paths of objects, checked so that they cannot lead out of the store.

use std::fmt;

use flynn_api::Digest;

/// The longest path.
const MAX_PATH: usize = 1024;
/// The longest segment: what file systems take.
const MAX_SEGMENT: usize = 255;

/// The path of an object: `/`-separated segments, none of them empty, `.` or `..`, without control characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlobPath(String);

impl BlobPath {
    /// Reads a path as it stands in a URL, with or without its leading `/`, percent-encoded.
    pub fn from_url(path: &str) -> Result<Self, String> {
        Self::new(&decode(path)?)
    }

    /// Checks a path, with or without its leading `/`.
    pub fn new(path: &str) -> Result<Self, String> {
        let path = path.strip_prefix('/').unwrap_or(path);
        if path.is_empty() {
            return Err("it is empty".into());
        }
        if path.len() > MAX_PATH {
            return Err(format!("it is longer than {MAX_PATH} bytes"));
        }
        for segment in path.split('/') {
            match segment {
                "" => return Err("it has an empty segment".into()),
                "." | ".." => return Err(format!("it has the segment {segment:?}")),
                _ if segment.len() > MAX_SEGMENT => {
                    return Err(format!("a segment is longer than {MAX_SEGMENT} bytes"));
                }
                _ if segment.chars().any(char::is_control) => return Err("it has a control character".into()),
                _ => {}
            }
        }
        Ok(Self(path.to_owned()))
    }

    /// The path without a leading `/`.
    pub fn relative(&self) -> &str {
        &self.0
    }

    /// The digest that the path promises for its content.
    pub fn promised_digest(&self) -> Option<Digest> {
        let (directory, name) = self.0.rsplit_once('/')?;
        let name = match directory {
            "layers" => name.strip_suffix(".squashfs")?,
            "images" => name.strip_suffix(".json")?,
            _ => return None,
        };
        name.parse().ok()
    }

    /// Whether objects beside the promised ones are refused here: `/layers/x.squashfs` must be named by its digest.
    pub fn must_promise(&self) -> bool {
        let extension = |extension: &str| {
            std::path::Path::new(&self.0)
                .extension()
                .is_some_and(|e| e == extension)
        };
        match self.0.rsplit_once('/') {
            Some(("layers", _)) => extension("squashfs"),
            Some(("images", _)) => extension("json"),
            _ => false,
        }
    }
}

impl fmt::Display for BlobPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.0)
    }
}

/// Undoes percent-encoding.
pub(crate) fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or("a % is not followed by two hex digits")?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    #[test]
    fn digests_are_promised_by_layers_and_images() {
        let digest = Digest::of(b"x");
        assert_eq!(
            BlobPath::new(&format!("/layers/{digest}.squashfs"))
                .unwrap()
                .promised_digest(),
            Some(digest)
        );
        assert_eq!(
            BlobPath::new(&format!("images/{digest}.json"))
                .unwrap()
                .promised_digest(),
            Some(digest)
        );
        assert_eq!(
            BlobPath::new(&format!("/other/{digest}.json"))
                .unwrap()
                .promised_digest(),
            None
        );
        assert!(BlobPath::new("/layers/abc.squashfs").unwrap().must_promise());
        assert!(
            !BlobPath::new("/layers/by-docker-id/sha256:abc.json")
                .unwrap()
                .must_promise()
        );
    }

    #[test]
    fn what_leads_out_is_refused() {
        for path in [
            "",
            "/",
            "//a",
            "a//b",
            "a/",
            "../a",
            "a/../../b",
            "./a",
            "a%2f..%2F..",
            "a%00b",
            "%zz",
            "a%f",
            "%ff",
        ] {
            assert!(BlobPath::from_url(path).is_err(), "{path:?}");
        }
        assert_eq!(BlobPath::from_url("/a%20b/c:d").unwrap().relative(), "a b/c:d");
    }

    proptest! {
        #[test]
        fn accepted_paths_stay_below_the_root(text in "(/|\\.|%2e|%2f|%5c|\\\\|a|%00|\\PC){0,24}") {
            if let Ok(path) = BlobPath::from_url(&text) {
                let path = Path::new(path.relative());
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
                prop_assert!(path.components().count() > 0);
            }
        }
    }
}
