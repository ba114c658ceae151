//! Jobs' logs on their way to a sink, while the daemon is killed and the sink breaks off.

use flynn_api::ErrorCode;
use flynn_api::sink::Sink;

use crate::host::Host;
use crate::receiver::{Breaking, Receiver, aggregator};

pub(crate) async fn sinks_get_each_line_once() {
    const LINES: usize = 20_000;
    let host = Host::boot().await;
    let receiver = Receiver::start(Breaking::After(4000), true);
    let sink = aggregator(&receiver);
    host.api.put_sink(&sink).await.unwrap();
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo $i; i=$((i+1)); [ $((i%500)) = 0 ] && sleep 0.05; done; sleep 1000"
    );
    let mut job = host.job(&script);
    job.metadata.insert("flynn-controller.type".into(), "web".into());
    host.run(&job).await;
    let process = format!("web.{}", job.id);
    for kill in 1..4 {
        let some = |received: &crate::receiver::Received| received.of(&process) > kill * LINES / 5;
        receiver.until("some lines", some);
        host.kill_daemon();
        host.start().await;
    }
    receiver.until("the last line", |received| {
        let lines = received.lines.get(&process).map(|(lines, _)| lines);
        lines.is_some_and(|lines| lines.last() == Some(&(LINES - 1).to_string()))
    });
    {
        let received = receiver.received.lock().unwrap();
        let (lines, _) = &received.lines[&process];
        assert!(
            lines
                .iter()
                .map(|line| line.parse::<usize>().unwrap())
                .eq(0..LINES)
        );
        assert!(received.connections > 4, "nothing was broken");
    }
    let status = host.api.sinks().await.unwrap().remove(0);
    assert_eq!((status.sink, status.dropped_lines), (sink.clone(), 0));

    let wrong = Sink {
        config: serde_json::json!({}),
        ..sink.clone()
    };
    let error = host.api.put_sink(&wrong).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Validation, "{error}");
    host.api.remove_sink(&sink.id).await.unwrap();
    assert_eq!(host.api.sinks().await.unwrap(), []);
    assert_eq!(
        host.api.remove_sink(&sink.id).await.unwrap_err().code,
        ErrorCode::NotFound
    );
}
