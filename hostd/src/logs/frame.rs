//! Bytes to lines.

/// The longest line; a longer one is cut into several.
const MAX_LINE: usize = 64 << 10;

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Framer {
    partial: Vec<u8>,
}

impl Framer {
    /// Takes the next bytes and gives the lines that they complete, without their ends.
    pub fn push(&mut self, mut bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        while !bytes.is_empty() {
            let room = MAX_LINE - self.partial.len();
            let window = &bytes[..bytes.len().min(room)];
            let end = window.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(window.len());
            self.partial.extend_from_slice(&window[..taken]);
            bytes = &bytes[taken + usize::from(end.is_some())..];
            if end.is_some() || self.partial.len() == MAX_LINE {
                lines.push(self.take());
            }
        }
        lines
    }

    /// What is left when the stream has ended.
    pub fn finish(&mut self) -> Option<String> {
        (!self.partial.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        let text = self.partial.strip_suffix(b"\r").unwrap_or(&self.partial);
        let line = String::from_utf8_lossy(text).into_owned();
        self.partial.clear();
        // One very long line must not keep its memory for ever.
        self.partial.shrink_to(1024);
        line
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn long_lines_are_cut() {
        let mut framer = Framer::default();
        let lines = framer.push(&vec![b'a'; MAX_LINE + 5]);
        assert_eq!((lines.len(), lines[0].len()), (1, MAX_LINE));
        assert_eq!(framer.push(b"\nb\r\n\n"), ["aaaaa", "b", ""]);
        assert_eq!(framer.finish(), None);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[a-c\n]{0,200}", cuts in proptest::collection::vec(0_usize..200, 0..8)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.sort_unstable();
            let mut framer = Framer::default();
            let mut lines = Vec::new();
            let mut from = 0;
            for to in cuts.into_iter().chain([text.len()]) {
                lines.extend(framer.push(&text.as_bytes()[from..to]));
                from = to;
            }
            lines.extend(framer.finish());
            prop_assert_eq!(lines, text.lines().map(str::to_owned).collect::<Vec<_>>());
        }
    }
}
