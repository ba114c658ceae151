//! Bytes to lines, and long lines to pieces.

/// The longest piece: with all that stands in front of it, it is a message that every syslog server takes.
const MAX_PIECE: usize = 7 << 10;

/// What a line is kept in between two reads, once it is written.
const SPARE: usize = 1 << 10;

/// Cuts a stream of bytes into lines, and lines that are longer than [`MAX_PIECE`] into pieces.
#[derive(Debug, Default)]
pub struct Framer {
    partial: Vec<u8>,
}

impl Framer {
    /// Takes the next bytes and hands on the lines that they complete, without their ends: each piece, and whether
    /// another piece of the same line follows it.
    pub fn push(&mut self, mut bytes: &[u8], mut piece: impl FnMut(&[u8], bool)) {
        while !bytes.is_empty() {
            // Room for an end of two bytes, which does not count.
            let room = (MAX_PIECE + 2).saturating_sub(self.partial.len());
            let window = &bytes[..bytes.len().min(room)];
            if let Some(end) = memchr::memchr(b'\n', window) {
                let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
                if self.partial.is_empty() {
                    finish(line, &mut piece);
                } else {
                    self.partial.extend_from_slice(line);
                    finish(&self.partial, &mut piece);
                    self.partial.clear();
                    // One very long line must not keep its memory for ever.
                    self.partial.shrink_to(SPARE);
                }
                bytes = rest;
                continue;
            }
            self.partial.extend_from_slice(window);
            bytes = &bytes[window.len()..];
            if self.partial.len() == MAX_PIECE + 2 {
                let cut = boundary(&self.partial, MAX_PIECE);
                piece(&self.partial[..cut], true);
                self.partial.drain(..cut);
            }
        }
    }

    /// What is left when the stream has ended.
    pub fn finish(&mut self, piece: impl FnOnce(&[u8], bool)) {
        if !self.partial.is_empty() {
            piece(&self.partial, false);
            self.partial = Vec::new();
        }
    }
}

/// The end of a line: its bytes are at most one more than a piece's, which then is a carriage return or a second piece.
fn finish(line: &[u8], piece: &mut impl FnMut(&[u8], bool)) {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.len() <= MAX_PIECE {
        return piece(line, false);
    }
    let cut = boundary(line, MAX_PIECE);
    piece(&line[..cut], true);
    piece(&line[cut..], false);
}

/// The last place at or before `at` that is not within a character.
fn boundary(text: &[u8], at: usize) -> usize {
    let inside = |at: &usize| text.get(*at).is_some_and(|byte| byte & 0xC0 == 0x80);
    (at - 3..=at).rev().find(|at| !inside(at)).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(framer: &mut Framer, bytes: &[u8]) -> Vec<(Vec<u8>, bool)> {
        let mut pieces = Vec::new();
        framer.push(bytes, |piece, more| pieces.push((piece.to_vec(), more)));
        pieces
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let mut framer = Framer::default();
        let text = "ä".repeat(MAX_PIECE / 2 + 4) + "\nb\r\n\n";
        let found = pieces(&mut framer, &text.as_bytes()[1..]);
        let lengths: Vec<_> = found.iter().map(|(piece, more)| (piece.len(), *more)).collect();
        assert_eq!(
            lengths,
            [(MAX_PIECE - 1, true), (8, false), (1, false), (0, false)]
        );
        assert_eq!(found[1].0, "ä".repeat(4).as_bytes());
        framer.finish(|_, _| unreachable!("nothing is left"));
    }

    #[test]
    fn what_exactly_fits_is_one_piece() {
        for end in ["\n", "\r\n"] {
            let text = "a".repeat(MAX_PIECE) + end;
            for cut in [0, MAX_PIECE - 1, MAX_PIECE, MAX_PIECE + 1] {
                let mut framer = Framer::default();
                let mut found = pieces(&mut framer, &text.as_bytes()[..cut]);
                found.extend(pieces(&mut framer, &text.as_bytes()[cut..]));
                assert_eq!(found, [(vec![b'a'; MAX_PIECE], false)], "{cut}");
            }
        }
    }

    proptest! {
        /// However the bytes come, the pieces put together again are the lines.
        #[test]
        fn pieces_make_the_lines(
            lines in proptest::collection::vec((any::<u8>(), 0_usize..3 * MAX_PIECE, ".{0,8}"), 0..6),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
        ) {
            let mut text = Vec::new();
            let mut wanted = Vec::new();
            for (byte, length, words) in lines {
                let byte = if matches!(byte, b'\n' | b'\r') { 0 } else { byte };
                let mut line = vec![byte; length];
                line.extend(words.bytes().filter(|byte| !matches!(byte, b'\n' | b'\r')));
                text.extend(&line);
                text.push(b'\n');
                wanted.push(line);
            }
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.sort_unstable();
            let (mut framer, mut found, mut line, mut from) = (Framer::default(), Vec::new(), Vec::new(), 0);
            for to in cuts.into_iter().chain([text.len()]) {
                for (piece, more) in pieces(&mut framer, &text[from..to]) {
                    prop_assert!(piece.len() <= MAX_PIECE);
                    line.extend(piece);
                    if !more {
                        found.push(std::mem::take(&mut line));
                    }
                }
                from = to;
            }
            prop_assert_eq!(found, wanted);
        }
    }
}
