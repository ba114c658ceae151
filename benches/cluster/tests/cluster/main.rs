//! What the platform promises, kept by a real cluster: everything through the command line's binary and the router.
//!
//! The tests share one lab, in this order; each makes what it needs of what is not there yet, so that one alone runs
//! as well: `cargo test -p flynn-cluster-tests -- shell`.

mod containers;
mod drain;
mod faults;
mod fixture;
mod floating;
mod input;
mod join;
mod life;
mod network;
mod recovery;
mod routes;
mod services;
mod traces;
mod up;

use fixture::Cluster;
use flynn_cluster_tests::{Artifacts, Engine, traffic};
use libtest_mimic::{Arguments, Trial};

type Test = fn(&mut Cluster) -> anyhow::Result<()>;

/// The test that wants a docker engine.
const PUSH_FROM_ENGINE: &str = "an_image_is_pushed_from_the_local_docker_engine";

const TESTS: &[(&str, Test)] = &[
    ("a_cluster_comes_up_from_built_images", life::comes_up),
    ("an_app_is_pushed_and_answers_through_the_router", life::answers),
    (PUSH_FROM_ENGINE, life::engine),
    (
        "three_instances_have_three_addresses_and_all_answer",
        life::scales,
    ),
    ("an_instance_that_is_killed_is_replaced", life::replaces),
    (
        "a_changed_environment_is_a_release_that_can_be_rolled_back",
        life::releases,
    ),
    ("an_app_shows_its_lines", life::logs),
    ("a_command_runs_in_an_app_with_its_exit_code", life::shell),
    ("services_are_reached_by_virtual_addresses", services::reached),
    (
        "services_are_reached_by_what_is_in_no_job_s_cgroup",
        services::bypassed,
    ),
    (
        "a_deposed_leader_s_clients_are_told_at_once",
        services::leader_changes,
    ),
    ("a_client_of_the_leader_goes_on_with_the_next", services::goes_on),
    ("the_platform_consists_of_apps", life::system_apps),
    ("bad_requests_are_refused_with_a_reason", input::requests),
    (
        "bad_archives_and_layers_are_refused_and_lose_nothing",
        input::archives,
    ),
    ("what_is_taken_or_unknown_is_said_to_be", input::names),
    ("hosts_say_what_they_lack", input::hosts),
    ("secrets_show_nowhere", input::secrets),
    ("killed_daemons_cost_no_request", faults::killed_daemons),
    ("renewed_certificates_cost_no_request", faults::renewal),
    ("a_full_disk_is_said_and_passes", faults::full_disk),
    ("the_app_answers_again_after_a_power_cut", faults::power_cut),
    ("hosts_join_with_tokens", join::joins),
    ("members_are_listed_by_each_host", join::listed),
    ("every_pair_of_containers_reaches_each_other", network::reaches),
    ("forged_packets_are_dropped_and_counted", network::forged),
    ("isolation_holds_across_hosts", network::isolated),
    ("what_the_network_does_is_seen", network::seen),
    ("a_drained_host_s_jobs_go_elsewhere", drain::drained),
    ("killed_daemons_cost_no_packet", network::killed),
    ("routes_by_port_lead_to_containers", routes::lead),
    ("an_upgrade_costs_no_packet", network::upgraded),
    ("a_lost_host_comes_back_into_the_network", network::lost_and_found),
    ("a_floating_address_moves_under_connections", floating::moves),
    (
        "a_lost_host_breaks_only_the_connections_of_its_containers",
        floating::host_lost,
    ),
    (
        "a_lost_majority_is_recovered_by_one_command",
        recovery::majority_lost,
    ),
    ("a_removed_host_loses_its_subnet", network::removed),
    ("nothing_is_left_after_down", faults::down),
    ("an_up_that_was_killed_leaves_nothing_after_down", up::killed),
];

fn main() {
    flynn_lab::reexec();
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some((traffic::COMMAND, rest)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        if let Err(error) = traffic::run(rest) {
            eprintln!("{error:#}");
            std::process::abort();
        }
        return;
    }
    let mut arguments = Arguments::from_args();
    // There is one cluster.
    arguments.test_threads = Some(1);
    let found = Artifacts::find();
    if let Err(why) = &found {
        eprintln!("skipped: {why}");
    }
    let no_engine = Engine::missing();
    if let Some(why) = &no_engine {
        eprintln!("skipped: {PUSH_FROM_ENGINE}: {why}");
    }
    let cluster = fixture::shared(found.as_ref().ok().cloned());
    let trials = TESTS.iter().map(|(name, test)| {
        let cluster = std::sync::Arc::clone(&cluster);
        let unfit = found.is_err() || (*name == PUSH_FROM_ENGINE && no_engine.is_some());
        Trial::test(*name, move || fixture::run(&cluster, *test)).with_ignored_flag(unfit)
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    // The lab ends with its value, and before this process does.
    drop(cluster);
    conclusion.exit();
}
