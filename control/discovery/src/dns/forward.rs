//! Asks upstream resolvers what is not ours.
//!
//! The client's message goes out as it came, under an id and from a port that nobody can guess; what comes back is
//! taken when it comes from the upstream, has that id and repeats the question. Upstreams are asked in turn, the one that
//! answered last first, until one knows an answer; what they answer is kept for as long as they say. Who asks alike at
//! the same time is asked for once: many equal queries under way are what a forger needs (RFC 5452, section 5).

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::OnceCell;

use super::cache::{Cache, key, readdress};
use super::zone::{MAX_UDP_PAYLOAD, Transport, failure};
use super::{read_framed, write_framed};

/// How long one upstream may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Rounds through all upstreams.
const ROUNDS: usize = 2;
const HEADER: usize = 12;
/// The bit that says that the answer was cut.
const TRUNCATED: u8 = 0x02;
/// Codes of a server that could not or would not answer, where another may: SERVFAIL, NOTIMP, REFUSED.
const UNANSWERED: [u8; 3] = [2, 4, 5];

/// The resolvers that are asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upstreams(Vec<SocketAddr>);

impl Upstreams {
    /// These.
    pub fn new(addrs: Vec<SocketAddr>) -> Self {
        Self(addrs)
    }

    /// Those that a `resolv.conf` names.
    pub fn of_resolv_conf(text: &str) -> Self {
        let addrs = text.lines().filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let addr = words
                .next()
                .filter(|word| *word == "nameserver")
                .and_then(|_| words.next())?;
            addr.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, 53))
        });
        Self(addrs.collect())
    }

    /// All but `own`, which would be asking ourselves.
    #[must_use]
    pub fn without(&self, own: Ipv4Addr) -> Self {
        Self(
            self.0
                .iter()
                .copied()
                .filter(|addr| addr.ip().to_canonical() != IpAddr::V4(own))
                .collect(),
        )
    }
}

/// Asks upstreams.
#[derive(Debug)]
pub struct Forwarder {
    upstreams: Upstreams,
    /// Which of them answered last.
    first: AtomicUsize,
    cache: Mutex<Cache>,
    under_way: Mutex<HashMap<Asked, Arc<OnceCell<Vec<u8>>>>>,
    began: Instant,
}

/// What is asked: all of a query but its id, and the transport.
type Asked = (Box<[u8]>, Transport);

impl Forwarder {
    /// Asks these.
    pub fn new(upstreams: Upstreams) -> Self {
        Self {
            upstreams,
            first: AtomicUsize::default(),
            cache: Mutex::default(),
            under_way: Mutex::default(),
            began: Instant::now(),
        }
    }

    /// The answer to a query, if it is known from before.
    pub fn kept(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let end = question_end(query)?;
        let kept = self.cache().get(query, end, self.now())?;
        Some(fit(query, kept, transport))
    }

    /// The answer to a query of a client: an upstream's, or that nobody could answer.
    pub async fn answer(&self, query: &[u8], transport: Transport) -> Vec<u8> {
        let Some(end) = question_end(query) else {
            return fit(query, self.ask(query, transport).await, transport);
        };
        let asked = (key(query, end), transport);
        let answer = Arc::clone(self.under_way().entry(asked.clone()).or_default());
        // Who waits for another's goes on itself when that one is given up.
        let told = answer.get_or_init(async || {
            // It may have come since this was looked for.
            let kept = self.cache().get(query, end, self.now());
            if let Some(kept) = kept {
                return kept;
            }
            let answer = self.ask(query, transport).await;
            if question_end(&answer) == Some(end) {
                self.cache().put(query, end, &answer, self.now());
            }
            answer
        });
        let mut told = told.await.clone();
        self.under_way().remove(&asked);
        if question_end(&told) == Some(end) {
            readdress(&mut told, query, end);
        } else if let Some(id) = told.first_chunk_mut::<2>() {
            id.copy_from_slice(&query[..2]);
        }
        fit(query, told, transport)
    }

    /// What the upstreams say.
    async fn ask(&self, query: &[u8], transport: Transport) -> Vec<u8> {
        let upstreams = &self.upstreams.0;
        for _ in 0..ROUNDS {
            let mut unanswered = None;
            let first = self.first.load(Ordering::Relaxed);
            for number in (0..upstreams.len()).map(|step| (first + step) % upstreams.len()) {
                match ask(upstreams[number], query, transport).await {
                    Ok(answer) if UNANSWERED.contains(&(answer[3] & 0x0f)) => {
                        unanswered.get_or_insert(answer);
                    }
                    Ok(answer) => {
                        self.first.store(number, Ordering::Relaxed);
                        return answer;
                    }
                    Err(error) => {
                        tracing::debug!(upstream = %upstreams[number], %error, "an upstream resolver did not answer");
                    }
                }
            }
            if let Some(answer) = unanswered {
                return answer;
            }
        }
        failure(query)
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<Asked, Arc<OnceCell<Vec<u8>>>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since its start.
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Cuts an answer down to what the client takes.
fn fit(query: &[u8], mut answer: Vec<u8>, transport: Transport) -> Vec<u8> {
    let taken = hickory_proto::op::Message::from_vec(query).map_or(512, |query| query.max_payload());
    if transport == Transport::Udp && answer.len() > usize::from(taken.clamp(512, MAX_UDP_PAYLOAD)) {
        let end = question_end(&answer).unwrap_or(HEADER);
        answer.truncate(end);
        answer[2] |= TRUNCATED;
        // The records are gone.
        answer[6..HEADER].fill(0);
    }
    answer
}

async fn ask(upstream: SocketAddr, query: &[u8], transport: Transport) -> io::Result<Vec<u8>> {
    let mut asked = query.to_vec();
    asked[..2].copy_from_slice(&rand::random::<u16>().to_be_bytes());
    let answered = async {
        if transport == Transport::Udp {
            let answer = ask_udp(upstream, &asked).await?;
            if answer[2] & TRUNCATED == 0 {
                return Ok(answer);
            }
        }
        ask_tcp(upstream, &asked).await
    };
    let mut answer = tokio::time::timeout(TIMEOUT, answered).await??;
    answer[..2].copy_from_slice(&query[..2]);
    Ok(answer)
}

async fn ask_udp(upstream: SocketAddr, asked: &[u8]) -> io::Result<Vec<u8>> {
    let any = match upstream {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    // A port of its own for each query, drawn by the kernel; connected, so that only the upstream is heard.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(upstream).await?;
    socket.send(asked).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if answers(asked, &buffer[..length]) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, asked: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    write_framed(&mut stream, asked).await?;
    let answer = read_framed(&mut stream).await?;
    answer.filter(|answer| answers(asked, answer)).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the answer does not belong to the question",
        )
    })
}

/// Whether `answer` is one to `asked`: a response of the same id that repeats the question.
fn answers(asked: &[u8], answer: &[u8]) -> bool {
    if answer.len() < HEADER || answer[..2] != asked[..2] || answer[2] & 0x80 == 0 {
        return false;
    }
    let (Some(asked_end), Some(answer_end)) = (question_end(asked), question_end(answer)) else {
        // Some servers leave the question out of an error.
        return answer[4..6] == [0, 0] && answer[3] & 0x0f != 0;
    };
    // The type and the class are no letters.
    asked_end == answer_end
        && asked[asked_end - 4..asked_end] == answer[asked_end - 4..asked_end]
        && asked[HEADER..asked_end - 4].eq_ignore_ascii_case(&answer[HEADER..asked_end - 4])
}

/// Where the one question of a message ends.
pub(super) fn question_end(message: &[u8]) -> Option<usize> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        // The first name of a message cannot point back to another.
        if length & 0xc0 != 0 {
            return None;
        }
        at += 1 + length;
        if length == 0 {
            return (at + 4 <= message.len()).then_some(at + 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf() {
        let text = "# x\nsearch a\nnameserver 192.0.2.1\n nameserver 2001:db8::1\nnameserver fe80::1%eth0\nnameserver";
        let upstreams = Upstreams::of_resolv_conf(text);
        let want = ["192.0.2.1:53", "[2001:db8::1]:53"].map(|addr| addr.parse().unwrap());
        assert_eq!(upstreams, Upstreams::new(want.to_vec()));
        assert_eq!(
            upstreams.without(Ipv4Addr::new(192, 0, 2, 1)),
            Upstreams::new(vec![want[1]])
        );
    }

    /// A query for a.b, type A, and one for this id's answer.
    fn message(id: [u8; 2], flags: [u8; 2]) -> Vec<u8> {
        let mut message = [id, flags].concat();
        message.extend([0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 1, b'B', 0, 0, 1, 0, 1]);
        message
    }

    #[test]
    fn answers_repeat_the_question() {
        let asked = message([1, 2], [1, 0]);
        let answer = message([1, 2], [0x81, 0x80]);
        assert!(answers(&asked, &answer));
        let end = answer.len();
        // Another id, a query, another name, another type.
        for (at, byte) in [(0, 9), (2, 1), (13, b'c'), (end - 3, 33)] {
            let mut other = answer.clone();
            other[at] = byte;
            assert!(!answers(&asked, &other), "{at}");
        }
        let mut lower = answer;
        lower[15] = b'b';
        assert!(answers(&asked, &lower));
        // An error without the question.
        assert!(answers(&asked, &[1, 2, 0x81, 5, 0, 0, 0, 0, 0, 0, 0, 0]));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_judged(asked: Vec<u8>, answer: Vec<u8>) {
            let mut asked = asked;
            asked.resize(asked.len().max(HEADER), 0);
            let _ = answers(&asked, &answer);
            if answer.len() >= HEADER {
                let _ = fit(&asked, answer, Transport::Udp);
            }
        }

        /// What begins as an answer does, and goes on anyhow.
        #[test]
        fn long_answers_are_cut(tail in proptest::collection::vec(proptest::num::u8::ANY, 0..2000)) {
            let asked = message([1, 2], [1, 0]);
            let mut answer = message([1, 2], [0x81, 0x80]);
            let end = answer.len();
            answer.extend(&tail);
            proptest::prop_assert!(answers(&asked, &answer));
            let fitting = fit(&asked, answer.clone(), Transport::Udp);
            if answer.len() <= 512 {
                proptest::prop_assert_eq!(fitting, answer);
            } else {
                proptest::prop_assert_eq!((fitting.len(), fitting[2] & TRUNCATED), (end, TRUNCATED));
            }
        }
    }
}
