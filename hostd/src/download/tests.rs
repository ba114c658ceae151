//! A real server on loopback that misbehaves.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::testing::{Fault, Server};

const QUICK: Patience = Patience {
    idle: Duration::from_millis(300),
    pause: Duration::from_millis(5),
};

fn content(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| u8::try_from(index * index / 7 % 251).unwrap())
        .collect()
}

fn expected(bytes: &[u8]) -> Expected {
    Expected {
        what: "the file".into(),
        length: bytes.len() as u64,
        hash: Hash::Sha512_256(Digest::of(bytes)),
    }
}

/// Fetches `file` from a server into the part at `path`.
async fn fetch(server: &Server, path: &Path, expected: &Expected) -> Result<()> {
    let http = crate::web::client(&server.url)?;
    let http = &http;
    let open = opener(|from, _| async move {
        let request = http::Request::get("/file").header("range", format!("bytes={from}-"));
        opened(
            http.send(request.body(flynn_api::client::full("")).unwrap())
                .await?,
        )
    });
    let mut part = Part::lock(path).await?.unwrap();
    fill(&mut part, expected, QUICK, open, |_| ()).await
}

struct Ground {
    _dir: tempfile::TempDir,
    server: Server,
    part: std::path::PathBuf,
    bytes: Vec<u8>,
}

async fn ground() -> Ground {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(300_000);
    let served = dir.path().join("served");
    std::fs::create_dir(&served).unwrap();
    std::fs::write(served.join("file"), &bytes).unwrap();
    Ground {
        server: Server::start(&served).await,
        part: dir.path().join("part"),
        _dir: dir,
        bytes,
    }
}

#[tokio::test]
async fn a_cut_connection_is_gone_on_with() {
    let ground = ground().await;
    ground.server.fault("file", Fault::Cut(100_000), 2);
    fetch(&ground.server, &ground.part, &expected(&ground.bytes))
        .await
        .unwrap();
    assert_eq!(std::fs::read(&ground.part).unwrap(), ground.bytes);
    let from: Vec<u64> = ground
        .server
        .requests()
        .into_iter()
        .map(|(_, from)| from)
        .collect();
    assert_eq!(from, [0, 100_000, 200_000]);
}

#[tokio::test]
async fn who_says_nothing_is_left_and_what_came_is_kept() {
    let ground = ground().await;
    let expected = expected(&ground.bytes);
    for fault in [Fault::Stall(1000), Fault::Stall(0)] {
        ground.server.fault("file", fault, u32::MAX);
        let error = fetch(&ground.server, &ground.part, &expected).await.unwrap_err();
        assert!(
            error.code == ErrorCode::Timeout && error.message.contains("said nothing"),
            "{error}"
        );
    }
    let kept = std::fs::metadata(&ground.part).unwrap().len();
    assert!(kept > 0 && kept % 1000 == 0, "{kept}");
    ground.server.fault("file", Fault::None, 1);
    fetch(&ground.server, &ground.part, &expected).await.unwrap();
    assert_eq!(ground.server.requests().last().unwrap().1, kept);
    assert_eq!(std::fs::read(&ground.part).unwrap(), ground.bytes);
}

#[tokio::test]
async fn no_more_is_taken_than_the_file_has() {
    let ground = ground().await;
    ground.server.fault("file", Fault::Endless, u32::MAX);
    let error = fetch(&ground.server, &ground.part, &expected(&ground.bytes))
        .await
        .unwrap_err();
    // Where the end falls between two pieces, it is the hash that shows it.
    assert!(
        matches!(error.code, ErrorCode::LimitExceeded | ErrorCode::Validation),
        "{error}"
    );
    assert!(!ground.part.exists());
}

#[tokio::test]
async fn what_was_there_is_not_believed() {
    let ground = ground().await;
    let expected = expected(&ground.bytes);
    let mut other = ground.bytes[..5000].to_vec();
    other[77] ^= 1;
    for (there, ranges) in [
        (other.clone(), true),
        (other, false),
        (ground.bytes[..5000].to_vec(), false),
        (vec![7; 400_000], true),
        (ground.bytes.clone(), true),
    ] {
        std::fs::write(&ground.part, there).unwrap();
        let fault = if ranges { Fault::None } else { Fault::NoRanges };
        ground.server.fault("file", fault, u32::MAX);
        fetch(&ground.server, &ground.part, &expected).await.unwrap();
        assert_eq!(std::fs::read(&ground.part).unwrap(), ground.bytes);
    }
}

#[tokio::test]
async fn another_file_is_refused_at_once() {
    let ground = ground().await;
    let mut wanted = ground.bytes.clone();
    wanted[299_999] ^= 1;
    let error = fetch(&ground.server, &ground.part, &expected(&wanted))
        .await
        .unwrap_err();
    assert!(error.message.contains("something else"), "{error}");
    assert_eq!(ground.server.requests().len(), 1);
    ground.server.fault("file", Fault::Status(404), 1);
    let error = fetch(&ground.server, &ground.part, &expected(&wanted))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    ground.server.fault("file", Fault::Status(302), 1);
    let error = fetch(&ground.server, &ground.part, &expected(&wanted))
        .await
        .unwrap_err();
    assert!(error.message.contains("302"), "{error}");
    // What may pass is tried again.
    ground.server.fault("file", Fault::Status(503), 2);
    fetch(&ground.server, &ground.part, &expected(&ground.bytes))
        .await
        .unwrap();
}

/// What a server does with one request.
#[derive(Clone, Debug)]
enum Whim {
    Refuses,
    Sends { from: u64, lies: bool, pieces: Vec<u16> },
}

fn whims() -> impl Strategy<Value = Vec<Whim>> {
    let pieces = proptest::collection::vec(0..400_u16, 0..6);
    let sends = (
        prop_oneof![4 => Just(u64::MAX), 1 => 0..2000_u64],
        prop::bool::weighted(0.1),
        pieces,
    );
    let whim = prop_oneof![
        1 => Just(Whim::Refuses),
        5 => sends.prop_map(|(from, lies, pieces)| Whim::Sends { from, lies, pieces }),
    ];
    proptest::collection::vec(whim, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_a_server_does_the_file_is_right_or_not_there(
        length in 0..2000_usize, there in proptest::collection::vec(any::<u8>(), 0..100), honest in 0..2000_usize, whims in whims(),
    ) {
        let bytes = content(length);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        // What an earlier run left: a part of the file, and bytes of another.
        let mut left = bytes[..honest.min(length)].to_vec();
        left.extend(&there);
        std::fs::write(&path, left).unwrap();
        let whims = Mutex::new(whims.into_iter());
        let (content, whims) = (&bytes, &whims);
        let open = opener(|asked: u64, _| async move {
            let bytes = content;
            let whim = whims.lock().unwrap().next();
            let (from, lies, pieces) = match whim {
                Some(Whim::Refuses) => return Err(Error::unavailable("not now")),
                Some(Whim::Sends { from, lies, pieces }) => (if from == u64::MAX { asked } else { from }, lies, pieces),
                None => (asked, false, vec![u16::MAX]),
            };
            let mut rest = bytes.get(usize::try_from(from).unwrap()..).unwrap_or_default().to_vec();
            if let (true, Some(first)) = (lies, rest.first_mut()) {
                *first ^= 1;
            }
            let mut sent = Vec::new();
            for piece in pieces {
                let after = rest.split_off(rest.len().min(piece.into()));
                sent.push(Ok(Bytes::from(std::mem::replace(&mut rest, after))));
            }
            Ok(Opened { start: from, length: None, body: futures::stream::iter(sent).boxed() })
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let patience = Patience { idle: Duration::from_secs(10), pause: Duration::ZERO };
        let filled = runtime.block_on(async {
            let mut part = Part::lock(&path).await?.unwrap();
            fill(&mut part, &expected(&bytes), patience, open, |_| ()).await
        });
        if filled.is_ok() {
            prop_assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }

    #[test]
    fn ranges_of_any_text_are_read_or_refused(header in "(bytes )?[0-9 ]{0,22}-[0-9]{0,22}/[0-9*]{0,5}|\\PC{0,30}") {
        if let Some((first, length)) = content_range(&header) {
            prop_assert!(header.trim().starts_with("bytes ") && length.is_none_or(|length| first < length));
        }
    }
}
