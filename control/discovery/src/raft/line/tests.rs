use std::time::Duration;

use bytes::Bytes;
use flynn_api::Error;
use flynn_api::server::CancellationToken;
use tokio::io::{DuplexStream, duplex};
use tokio::time::{sleep, timeout};

use super::answerer::answer;
use super::caller::Line;

/// Says what was said; `fail` fails, `never` never answers, `later` only after a second.
async fn echo(name: String, body: Bytes) -> Result<Vec<u8>, Error> {
    match name.as_str() {
        "fail" => Err(Error::conflict("no")),
        "never" => std::future::pending().await,
        "later" => {
            sleep(Duration::from_secs(1)).await;
            Ok(body.to_vec())
        }
        _ => Ok(body.to_vec()),
    }
}

fn answered(closing: CancellationToken) -> Line {
    let (here, there) = duplex(64);
    tokio::spawn(answer(there, closing, echo));
    Line::over(here)
}

/// A line at whose other end nobody says anything.
fn silent() -> (Line, DuplexStream) {
    let (here, there) = duplex(1 << 20);
    (Line::over(here), there)
}

#[tokio::test(start_paused = true)]
async fn calls_are_answered_in_any_order() {
    let line = answered(CancellationToken::new());
    let long = "x".repeat(100_000);
    let (later, long, failed) = tokio::join!(
        line.call("later", &1),
        line.call("echo", &long),
        line.call("fail", &())
    );
    assert_eq!((later.unwrap(), long.unwrap().len()), ("1".into(), 100_002));
    assert_eq!(failed.unwrap_err(), Error::conflict("no"));
    assert!(!line.is_over());
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_leaves_the_line_to_others() {
    let line = answered(CancellationToken::new());
    let given_up = timeout(Duration::from_millis(100), line.call("never", &())).await;
    assert!(given_up.is_err());
    assert_eq!(line.call("echo", &2).await.unwrap(), "2");
    sleep(Duration::from_secs(10)).await;
    assert!(!line.is_over());
}

#[tokio::test(start_paused = true)]
async fn a_line_that_died_in_silence_is_over() {
    let (line, _there) = silent();
    sleep(Duration::from_secs(10)).await;
    assert!(!line.is_over(), "nothing was asked");
    for _ in 0..3 {
        assert!(!line.is_over());
        let late = timeout(Duration::from_millis(400), line.call("echo", &())).await;
        assert!(late.is_err());
    }
    assert!(line.is_over());
}

#[tokio::test(start_paused = true)]
async fn calls_of_a_lost_connection_may_have_been_done() {
    let (line, there) = silent();
    let lost = async {
        sleep(Duration::from_millis(10)).await;
        drop(there);
    };
    let (said, ()) = tokio::join!(line.call("echo", &()), lost);
    assert!(said.unwrap_err().may_be_done());
    assert!(line.is_over());
    assert!(line.call("echo", &()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_member_that_ends_ends_its_lines() {
    let closing = CancellationToken::new();
    let line = answered(closing.clone());
    line.call("echo", &()).await.unwrap();
    let end = async {
        sleep(Duration::from_millis(10)).await;
        closing.cancel();
    };
    let (said, ()) = tokio::join!(line.call("never", &()), end);
    assert!(said.is_err() && line.is_over());
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_answer_end_the_line() {
    use tokio::io::AsyncWriteExt as _;
    let (line, mut there) = silent();
    let other = async {
        there.write_all(&[0, 0, 0, 2, 1, 2]).await.unwrap();
        sleep(Duration::from_mins(1)).await;
    };
    tokio::select! {
        said = line.call("echo", &()) => assert!(said.is_err()),
        () = other => panic!("the line goes on"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_line_that_nobody_holds_is_closed_though_the_other_end_says_nothing() {
    use tokio::io::AsyncReadExt as _;
    let (line, mut there) = silent();
    let _ = timeout(Duration::from_millis(100), line.call("echo", &())).await;
    drop(line);
    let mut said = Vec::new();
    timeout(Duration::from_secs(1), there.read_to_end(&mut said))
        .await
        .expect("it is closed")
        .unwrap();
    assert!(!said.is_empty(), "the call had been sent");
}
