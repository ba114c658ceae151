//! One record: a piece of a line as a message of RFC 5424, behind its length and a blank (octet counting, RFC 6587).
//!
//! ```text
//! 142 <14>1 2026-01-02T03:04:05.678901Z host1 2f1f… web.host1-9c… ID1 [flynn run="1767323045678901" seq="17"] hello
//! ```
//!
//! HOSTNAME is the host's id, APP-NAME the app's, PROCID the process type and the job's id. MSGID says the stream:
//! `ID1` standard output, `ID2` standard error, `ID3` the supervisor's own words. The structured data say which record it
//! is: `seq` counts up from 1 within `run`, which grows whenever a log is opened anew, so both together order the
//! records of a job and tell a record that comes twice. `more="true"` says that the line goes on in the next record of
//! the same stream. The text is what the program wrote, byte by byte: RFC 5424 allows that, and nothing in it is escaped.

use std::io::Write as _;

use flynn_api::host::{LogLine, LogStream};
use jiff::Timestamp;

/// The longest record that is read: one that claims more is broken.
const MAX_RECORD: usize = 16 << 10;

/// Whose records they are.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// `<host id>-<uuid>`.
    pub job_id: String,
    /// The app's id; empty for an operator's own job.
    pub app_id: String,
    /// The process type; may be empty.
    pub process_type: String,
}

/// Which record of a job's log it is; they are in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    /// When the log was opened, in microseconds since 1970 or one more than the run before.
    pub run: u64,
    /// Counts from 1.
    pub seq: u64,
}

/// Makes records.
#[derive(Debug)]
pub struct Encoder {
    /// By stream: what stands between time and `seq`.
    middles: [Vec<u8>; 3],
    time: Vec<u8>,
}

impl Encoder {
    /// For records of this origin and run.
    pub fn new(origin: &Origin, run: u64) -> Self {
        let host = origin.job_id.split('-').next().unwrap_or_default();
        let process = if origin.process_type.is_empty() {
            origin.job_id.clone()
        } else {
            format!("{}.{}", origin.process_type, origin.job_id)
        };
        let middle = |id| {
            let (host, app, process) = (name(host, 255), name(&origin.app_id, 48), name(&process, 128));
            format!(" {host} {app} {process} {id} [flynn run=\"{run}\" seq=\"").into_bytes()
        };
        Self {
            middles: ["ID1", "ID2", "ID3"].map(middle),
            time: Vec::new(),
        }
    }

    /// The time of the records that follow.
    pub fn at(&mut self, time: Timestamp) {
        self.time.clear();
        let _ = write!(self.time, "{time:.6}");
    }

    /// Appends one record.
    pub fn record(&self, to: &mut Vec<u8>, stream: LogStream, seq: u64, text: &[u8], more: bool) {
        let (priority, middle): (&[u8], _) = match stream {
            LogStream::Stdout => (b"<14>1 ", &self.middles[0]),
            LogStream::Stderr => (b"<11>1 ", &self.middles[1]),
            LogStream::Init => (b"<13>1 ", &self.middles[2]),
        };
        let end: &[u8] = if more { b"\" more=\"true\"] " } else { b"\"] " };
        let mut digits = [0; 20];
        let seq = decimal(seq, &mut digits);
        let length = priority.len() + self.time.len() + middle.len() + seq.len() + end.len() + text.len();
        let mut of_length = [0; 20];
        let parts: [&[u8]; 8] = [
            decimal(length as u64, &mut of_length),
            b" ",
            priority,
            &self.time,
            middle,
            seq,
            end,
            text,
        ];
        to.reserve(length + 21);
        for part in parts {
            to.extend_from_slice(part);
        }
    }
}

/// A number's digits, at the end of `room`.
fn decimal(mut number: u64, room: &mut [u8; 20]) -> &[u8] {
    let mut from = room.len();
    loop {
        from -= 1;
        room[from] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        if number == 0 {
            return &room[from..];
        }
    }
}

/// A header field: printable ASCII of bounded length, `-` where there is none.
pub fn name(text: &str, longest: usize) -> String {
    let plain = |c: char| if c.is_ascii_graphic() { c } else { '_' };
    let name: String = text.chars().take(longest).map(plain).collect();
    if name.is_empty() { "-".into() } else { name }
}

/// What stands at the start of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framed {
    /// A record: its message is at `from..to`.
    Whole {
        /// Behind the length.
        from: usize,
        /// The record's end.
        to: usize,
    },
    /// The start of one.
    Partial,
    /// None.
    Broken,
}

/// Looks for the end of the first record.
pub fn framed(bytes: &[u8]) -> Framed {
    let mut length = 0;
    for (index, byte) in bytes.iter().enumerate() {
        match byte {
            b'0'..=b'9' if length <= MAX_RECORD && !(index == 0 && *byte == b'0') => {
                length = length * 10 + usize::from(byte - b'0');
            }
            b' ' if (1..=MAX_RECORD).contains(&length) => {
                let (from, to) = (index + 1, index + 1 + length);
                return if to <= bytes.len() {
                    Framed::Whole { from, to }
                } else {
                    Framed::Partial
                };
            }
            _ => return Framed::Broken,
        }
    }
    Framed::Partial
}

/// A message's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// `<14>1`.
    pub priority: &'a [u8],
    /// TIMESTAMP.
    pub time: &'a [u8],
    /// HOSTNAME.
    pub host: &'a [u8],
    /// APP-NAME.
    pub app: &'a [u8],
    /// PROCID.
    pub process: &'a [u8],
    /// MSGID.
    pub kind: &'a [u8],
    /// STRUCTURED-DATA, brackets included.
    pub data: &'a [u8],
    /// MSG.
    pub text: &'a [u8],
    /// Which record it is.
    pub id: Id,
    /// Whether its line goes on.
    pub more: bool,
}

impl<'a> Record<'a> {
    /// Takes a message apart. None for one that has not the form which [`Encoder`] gives.
    pub fn parse(message: &'a [u8]) -> Option<Self> {
        let mut parts = message.splitn(7, |byte| *byte == b' ');
        let mut next = || parts.next();
        let (priority, time, host) = (next()?, next()?, next()?);
        let (app, process, kind, rest) = (next()?, next()?, next()?, next()?);
        let (mut id, mut more) = (Id::default(), false);
        let mut params = rest.strip_prefix(b"[flynn")?;
        while let Some(after) = params.strip_prefix(b" ") {
            let (name, after) = cut(after, b"=\"")?;
            let (value, after) = cut(after, b"\"")?;
            let number = || std::str::from_utf8(value).ok()?.parse().ok();
            match name {
                b"run" => id.run = number()?,
                b"seq" => id.seq = number()?,
                b"more" => more = value == b"true",
                _ => {}
            }
            params = after;
        }
        let text = params.strip_prefix(b"] ")?;
        Some(Self {
            priority,
            time,
            host,
            app,
            process,
            kind,
            data: &rest[..rest.len() - text.len() - 1],
            text,
            id,
            more,
        })
    }

    /// The stream that it came from.
    pub fn stream(&self) -> LogStream {
        match self.kind {
            b"ID1" => LogStream::Stdout,
            b"ID2" => LogStream::Stderr,
            _ => LogStream::Init,
        }
    }

    /// As a line of this text, which may have been put together from several records.
    pub fn line(&self, text: &[u8]) -> Option<LogLine> {
        let process = String::from_utf8_lossy(self.process);
        let (kind, job) = process.rsplit_once('.').unwrap_or(("", &process));
        Some(LogLine {
            timestamp: std::str::from_utf8(self.time).ok()?.parse().ok()?,
            stream: self.stream(),
            msg: String::from_utf8_lossy(text).into_owned(),
            job_id: job.to_owned(),
            process_type: kind.to_owned(),
        })
    }
}

fn cut<'a>(bytes: &'a [u8], at: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let index = bytes.windows(at.len()).position(|window| window == at)?;
    Some((&bytes[..index], &bytes[index + at.len()..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn origin() -> Origin {
        Origin {
            job_id: "host1-9c".into(),
            app_id: "2f1f".into(),
            process_type: "web".into(),
        }
    }

    #[test]
    fn a_record_is_as_the_standards_say() {
        let mut encoder = Encoder::new(&origin(), 7);
        encoder.at("2026-01-02T03:04:05.678901Z".parse().unwrap());
        let mut bytes = Vec::new();
        encoder.record(&mut bytes, LogStream::Stderr, 17, b"hello", true);
        assert_eq!(
            String::from_utf8_lossy(&bytes),
            "104 <11>1 2026-01-02T03:04:05.678901Z host1 2f1f web.host1-9c ID2 [flynn run=\"7\" seq=\"17\" more=\"true\"] hello"
        );
        encoder.at(Timestamp::UNIX_EPOCH);
        bytes.clear();
        encoder.record(&mut bytes, LogStream::Stdout, 1, b"", false);
        assert!(
            bytes
                .windows(27)
                .any(|time| time == b"1970-01-01T00:00:00.000000Z")
        );
    }

    #[test]
    fn odd_names_stay_header_fields() {
        assert_eq!(name("a b\u{e9}\n", 3), "a_b");
        assert_eq!(name("", 3), "-");
    }

    #[test]
    fn lengths_that_lie_are_broken() {
        for broken in ["x", " 5", "05 hello", "99999999999999999999 x", "-1 x", "5\n"] {
            assert_eq!(framed(broken.as_bytes()), Framed::Broken, "{broken}");
        }
        for partial in ["", "5", "5 ", "5 hell"] {
            assert_eq!(framed(partial.as_bytes()), Framed::Partial, "{partial}");
        }
        assert_eq!(framed(b"5 hello5"), Framed::Whole { from: 2, to: 7 });
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            text in proptest::collection::vec(any::<u8>(), 0..300), run: u64, seq: u64, more: bool, stream in 0_usize..3,
        ) {
            let stream = [LogStream::Stdout, LogStream::Stderr, LogStream::Init][stream];
            let mut encoder = Encoder::new(&origin(), run);
            encoder.at(Timestamp::UNIX_EPOCH);
            let mut bytes = Vec::new();
            encoder.record(&mut bytes, stream, seq, &text, more);
            let Framed::Whole { from, to } = framed(&bytes) else { panic!("not whole") };
            prop_assert_eq!(to, bytes.len());
            let record = Record::parse(&bytes[from..]).unwrap();
            prop_assert_eq!((record.id, record.more, record.stream()), (Id { run, seq }, more, stream));
            prop_assert_eq!(record.text, text);
            let line = record.line(record.text).unwrap();
            prop_assert_eq!((line.job_id, line.process_type), ("host1-9c".into(), "web".into()));
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            framed(&bytes);
            Record::parse(&bytes);
        }

        #[test]
        fn messages_with_odd_ends_are_survived(text in "<14>1 t h a p ID1 \\[flynn( [a-z]{1,4}=\"[0-9]{0,3}\"){0,3}[\\]\" ]{0,3}.{0,5}") {
            if let Some(record) = Record::parse(text.as_bytes()) {
                prop_assert!(text.as_bytes().ends_with(record.text) && record.data.ends_with(b"]"));
            }
        }
    }
}
